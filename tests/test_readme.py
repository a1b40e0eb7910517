"""What the README and the other pages name is there: files, flags, links, and commands that can be typed. And the README's
first screen is enough to begin: the demo's command, and what one sees.

One worked case. The README's line `python train_bert.py --demo` names the file train_bert.py, which is in the root, and the
flag --demo, which is a field of BertOptions. A page that named qa/predict.py, or a flag --doc-stride, would fail.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from qa.data.squad import load_squad
from qa.evaluation.show import marked_passages
from qa.flags import parse
from qa.options import DEMO_BERT, DEMO_LLAMA, AskOptions, BertOptions, EvaluateOptions, LlamaOptions, ReportOptions, flag
from qa.prediction import Candidate, Prediction

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
SCRIPTS = {"train_bert.py": (BertOptions, DEMO_BERT), "train_llama.py": (LlamaOptions, DEMO_LLAMA),
           "evaluate.py": (EvaluateOptions, None), "qa.ask": (AskOptions, None),
           "qa.report": (ReportOptions, None)}
THEIRS = {"run_qa.py", "--no-deps", *"--nproc_per_node --nnodes --rdzv_backend --rdzv_endpoint --rdzv_id".split(),
          *"--job-name --array --time --signal --ntasks --cpus-per-task --gpus --output".split(),
          *"--nodes --ntasks-per-node --gpus-per-node".split()}  # transformers', pip's, torchrun's, SLURM's
FIRST_SCREEN = 40  # lines


def text_of(page: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.replace("\\\n", " ").replace(" -->", "")  # a command over two lines, or in a comment


def files(text: str) -> set[str]:
    """Files, and folders in backticks."""
    folders = set(re.findall(r"`((?:qa|tests|benchmarks|docs)/(?:\w+/)*)`", text))
    return folders | set(re.findall(r"[\w/-]+\.(?:py|md|txt|toml)\b", text)) - THEIRS


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - THEIRS


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, its flags), wherever a script is followed by any."""
    names = r"\b(train_bert\.py|train_llama\.py|evaluate\.py|qa\.ask|qa\.report)"
    return [(script, shlex.split(rest)) for script, rest in re.findall(names + r"( --[^`#\n|]*)", text)]


def anchors(text: str) -> set[str]:
    """The headings as GitHub links to them: "The seven systems" is #the-seven-systems."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def demo_block() -> str:
    """What the README shows of the demo's output."""
    return re.search(r"<!-- ci: demo output -->\n```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]


def masked(text: str) -> str:
    """`text` in one line, without what differs between machines: numbers, and which words the model marked."""
    text = re.sub(r"answer: .*?(?=\s+gold:)", "answer: ?", text.replace("[[", "").replace("]]", ""))
    return re.sub(r"\b\d+(\.\d+)?", "0", " ".join(text.split()))


def missing(shown: list[str], printed: str) -> list[str]:
    """The lines that are not in `printed`, each after the one before; "..." is for what a line leaves out."""
    printed, lost = masked(printed), []
    for part in (masked(part) for line in shown for part in line.split("...")):
        _, found, rest = printed.partition(part) if part else ("", True, printed)
        lost += [] if found else [part]
        printed = rest if found else printed
    return lost


def test_worked_case():
    line = "python train_bert.py --demo"
    assert (files(line), flags(line), commands(line)) == ({"train_bert.py"}, {"--demo"}, [("train_bert.py", ["--demo"])])
    assert line in text_of("README.md")
    assert files("`qa/bert/` and qa/cli.py") == {"qa/bert/", "qa/cli.py"}
    assert anchors("## The most probable span, exactly") == {"the-most-probable-span-exactly"}
    printed = "step 1\nEM 91.5, F1 92\n  was lit in\n  [[1844]] and\n  answer: 1844    gold: 1844\n"
    assert missing(["EM 96.2, F1 97", "...", "  lit in 1844 ...", "  answer: in 1844    gold: 1844"], printed) == []
    assert missing(["gold: 1844", "EM 91.5, F1 92"], printed) == ["EM 0, F1 0"]  # in another order


def test_first_screen_says_how_to_begin_and_what_one_sees():
    screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:FIRST_SCREEN])
    assert "python train_bert.py --demo" in screen and demo_block() in screen
    assert all(words in screen for words in ("before training", "after training", "[[", "from_pretrained", "Next:"))


def test_passage_on_the_first_screen_is_one_that_the_demo_shows():
    """With the gold answers as predictions, no model is needed."""
    data = load_squad("demo", "dev")
    golds = [example.answers[0] for example in data.examples]
    predictions = [Prediction(example.id, gold.text, [Candidate(gold.text, gold.start_char, gold.end_char, 0.0, 1.0)])
                   for example, gold in zip(data.examples, golds, strict=True)]
    shown = [line for line in demo_block().splitlines() if line.startswith("  ")]
    assert len(shown) >= 4 and missing(shown, marked_passages(data, predictions, 3, None)) == []


@pytest.mark.skipif("DEMO_OUTPUT" not in os.environ, reason="DEMO_OUTPUT is not set: .ci/run sets it, after the demo")
def test_demo_prints_what_the_first_screen_shows():
    assert missing(demo_block().splitlines(), Path(os.environ["DEMO_OUTPUT"]).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    """With its folder; or without it, in whichever."""
    names = {path.name for folder in ("qa", "benchmarks", "docs", "tests") for path in (ROOT / folder).rglob("*.*")}
    names |= set(re.findall(r"<!-- file: (\S+)", text_of(page)))  # of a user's, shown in the page
    assert [name for name in files(text_of(page)) if not (ROOT / name).exists() and name not in names] == []


def test_reading_order_has_every_module():
    order = text_of("README.md").partition("## Reading order")[2].partition("\n## ")[0]
    modules = [*ROOT.glob("*.py"), *(path for path in (ROOT / "qa").rglob("*.py") if path.name != "__init__.py")]
    assert [path.name for path in modules if path.name not in order] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text_of(page)):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), path
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), anchor


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_is_named_is_one_of_a_script_or_a_benchmark(page):
    known = {flag(name) for cls, _ in SCRIPTS.values() for name in cls.__dataclass_fields__}
    known |= {name for path in (ROOT / "benchmarks").rglob("*.py") for name in re.findall(r'add_argument\("(--[\w-]+)"',
                                                                                        path.read_text())}
    assert flags(text_of(page)) - known - {"--help"} == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_command_can_be_parsed(page, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as under torchrun, for --shard
    for script, argv in commands(text_of(page)):
        cls, demo = SCRIPTS[script]
        if argv != ["--help"]:
            parse(cls, "", demo, argv)
