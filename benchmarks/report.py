"""How long the report takes, and its peak memory: 20 runs that answered 10,570 questions, as many as SQuAD v1.1's dev set has.

    python benchmarks/report.py
    python benchmarks/report.py --runs 5 --questions 1000

The runs are random: two sizes and ten seeds, 48 articles, passages of 120 words with 5 questions each, logs of 1,000 lines. The
report is made as a user makes it, in a process of its own, with the questions (--data).
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from processes import run  # noqa: E402

from qa.options import BertOptions  # noqa: E402

WORDS = "the of and in to a was is for as on with by he that at from his it an were are which this be or has".split()


def write_data(path: Path, num_questions: int, draw: random.Random) -> dict[str, str]:
    """A SQuAD file; returns {id: title}."""
    articles = [{"title": f"Article {number}", "paragraphs": []} for number in range(48)]
    titles = {}
    for first in range(0, num_questions, 5):
        article, context = draw.choice(articles), " ".join(draw.choices(WORDS, k=120))
        ids = [str(number) for number in range(first, min(first + 5, num_questions))]
        answers = [{"text": context[:12], "answer_start": 0}] * 3
        article["paragraphs"].append({"context": context, "qas": [
            {"id": name, "question": f"{draw.choice(['Who', 'What', 'When'])} was it?", "answers": answers} for name in ids]})
        titles |= dict.fromkeys(ids, article["title"])
    path.write_text(json.dumps({"version": "1.1", "data": articles}))
    return titles


def write_run(folder: Path, titles: dict[str, str], size: int, seed: int, draw: random.Random) -> None:
    (folder / "evaluation").mkdir(parents=True)
    questions = {}
    for name, title in titles.items():
        exact = float(draw.random() < 0.5)
        questions[name] = {"title": title, "exact": exact, "f1": max(exact, draw.random()), "no_answer_score": None,
                           "prediction": " ".join(draw.choices(WORDS, k=3)), "confidence": draw.random()}
    options = asdict(BertOptions(train_data="train.json", max_train_questions=size, seed=seed))
    log = "\n".join(json.dumps({"event": "step", "step": step, "loss": draw.random() + 100 / step, "windows_per_second": 5.0})
                    for step in range(1, 1001))
    for name, content in (("evaluation/per_question.json", json.dumps(questions)), ("log.jsonl", log + "\n"),
                          ("options.json", json.dumps({**options, "kind": "bert"}))):
        (folder / name).write_text(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--questions", type=int, default=10_570)
    args, draw = parser.parse_args(), random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / f"run-{number}" for number in range(args.runs)]
        titles = write_data(Path(scratch) / "dev.json", args.questions, draw)
        for number, folder in enumerate(folders):
            write_run(folder, titles, 1000 * (1 + number % 2), number // 2, draw)
        begin, out = time.perf_counter(), Path(scratch) / "report.html"
        _, memory = run(["-m", "qa.report", *map(str, folders), "--data", f"{scratch}/dev.json", "--out", str(out)])
        seconds, size = time.perf_counter() - begin, out.stat().st_size / 1e6
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"{args.runs} runs of {args.questions:,} questions: {seconds:.1f} s, of which the processor worked "
              f"{used.ru_utime + used.ru_stime:.1f}; {memory:,} MB; a page of {size:.2f} MB")


if __name__ == "__main__":
    main()
