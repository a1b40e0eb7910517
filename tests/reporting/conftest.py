"""Runs as the train scripts and evaluate.py leave them, made in no time (`make_run`), and what a page marks in passages."""

from __future__ import annotations

import dataclasses
import html
import json
import random
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qa import report
from qa.data.squad import SquadData, load_squad
from qa.errors import exit_status
from qa.evaluation.results import result_files, write_results
from qa.options import BertOptions, LlamaOptions
from qa.prediction import Candidate, Prediction

SCRIPT = "<script>document.title='pwned'</script>"
CLASSES = {"bert": BertOptions, "lora": LlamaOptions}


def predictions_for(data: SquadData, share_right: float, seed: int) -> list[Prediction]:
    """Some answers are a gold one, the others a random word of the passage; v2.0 with no-answer scores."""
    draw, found = random.Random(seed), []
    for passage in data.passages:
        for example in passage.examples:
            word = draw.choice(passage.text.split())
            text, start = word, passage.text.index(word)
            if example.answers and draw.random() < share_right:
                text, start = example.answers[0].text, example.answers[0].start_char
            confidence = draw.random()
            null = {"no_answer_score": draw.gauss(-1, 1), "null_score": 0.0, "null_confidence": draw.random()}
            found.append(Prediction(example.id, text, [Candidate(text, start, start + len(text), 1.0, confidence)],
                                    **(null if data.is_v2 else {})))
    return found


def make_run(folder: Path, source: Path, kind: str = "bert", size: int | None = None, seed: int = 0, share_right: float = 0.5,
             **options) -> Path:
    """`source`: the SQuAD file that it is evaluated on."""
    data = load_squad(str(source), "dev")
    (folder / "model").mkdir(parents=True)
    recorded = dataclasses.asdict(CLASSES[kind](train_data="train.json", max_train_questions=size, seed=seed, out=str(folder),
                                                **options))
    (folder / "options.json").write_text(json.dumps({**recorded, "kind": kind}))
    (folder / "train_questions.json").write_text(json.dumps([f"q{number}" for number in range(size or 7)]))
    (folder / "finished.json").write_text(json.dumps({"step": 3, "seconds": 90.0 + 60 * seed}))
    items = {"bert": "windows", "lora": "questions"}[kind]
    (folder / "log.jsonl").write_text("".join(
        json.dumps({"event": "step", "step": step, "loss": 3 / step, f"{items}_per_second": 4.0 + step}) + "\n"
        for step in (1, 2, 3)) + '{"event": "step", "ste')  # cut by a kill
    save_file({"a.weight": torch.zeros(3, 4), "b.weight": torch.zeros(5)}, folder / "model" / "model.safetensors")
    threshold = 0.0 if data.is_v2 else None
    files = result_files(data, predictions_for(data, share_right, seed), threshold)
    conditions = {"ckpt": str(folder), "data": str(source), "na_threshold": threshold,
                  "identity": {"ckpt": str(folder), "data": str(source), "precision": "fp32"}}
    write_results(folder / "evaluation", {**files, "metrics.json": {"f1": 0.0}, "conditions.json": conditions})
    return folder


@pytest.fixture
def runs(tmp_path, small_squad_file) -> dict[str, Path]:
    """BERT on 10 questions with 3 seeds and on 20 with one; LoRA on 10 with two seeds."""
    grid = [("bert", 10, 0), ("bert", 10, 1), ("bert", 10, 2), ("bert", 20, 0), ("lora", 10, 0), ("lora", 10, 1)]
    return {f"{kind}-{size}-{seed}": make_run(tmp_path / f"{kind}-{size}-{seed}", small_squad_file, kind, size, seed,
                                              share_right=0.2 + size / 40) for kind, size, seed in grid}


@pytest.fixture
def two_v2_runs(tmp_path, small_squad_v2, small_squad_v2_file) -> list[Path]:
    """In every passage, question, title and answer there is a script."""
    for number, article in enumerate(small_squad_v2["data"]):
        article["title"] = f"{SCRIPT}{number}"
        for paragraph in article["paragraphs"]:
            paragraph["context"] += f" {SCRIPT} & more"
            answer = {"text": SCRIPT, "answer_start": paragraph["context"].index(SCRIPT)}
            paragraph["qas"][0] |= {"question": f"What is {SCRIPT}?", "is_impossible": False, "answers": [answer]}
    small_squad_v2_file.write_text(json.dumps(small_squad_v2))
    return [make_run(tmp_path / "one<b>", small_squad_v2_file, "bert", share_right=0.8),
            make_run(tmp_path / "two", small_squad_v2_file, "lora", share_right=0.3)]


def run_report(monkeypatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, argv)])
    return exit_status(report.main)


class Spans(HTMLParser):
    """The texts of a page, and with which classes they are marked: (text, classes of all elements around it)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack, self.parts, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "path", "use", "br"):
            self.stack.append((tag, dict(attributes).get("class", "").split()))

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop()[0] != tag:
            pass

    def handle_data(self, data):
        self.parts.append((data, {name for _, names in self.stack for name in names}))


def marked_passages(text: str) -> dict[str, list[tuple[str, set[str]]]]:
    """id of the question -> its passage on the page, in parts: (text, classes)."""
    found = {}
    for article in text.split('<article id="q-')[1:]:
        name, _, rest = article.partition("</article>")[0].partition('">')
        found[html.unescape(name)] = [part for part in Spans(rest).parts if "passage" in part[1]]
    return found


def assert_marked(parts: list[tuple[str, set[str]]], passage: str, marks: dict[str, list[tuple[int, int]]]) -> None:
    """The parts are the passage, or a piece of it with all that is marked; each character is marked as `marks` says."""
    parts = [(text.removeprefix("… ").removesuffix(" …"), names) for text, names in parts]
    shown = "".join(text for text, _ in parts)
    offset = passage.index(shown)
    for name, spans in marks.items():
        flags = [name in names for text, names in parts for _ in text]
        wanted = [any(start <= place < end for start, end in spans) for place in range(offset, offset + len(shown))]
        assert flags == wanted and sum(wanted) == len({place for span in spans for place in range(*span)})
