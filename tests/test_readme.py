"""What the README and the other pages name is there: files, flags, and commands that can be typed.

One worked case. The README's line `python train_bert.py --demo` names the file train_bert.py, which is in the root, and the
flag --demo, which is a field of BertOptions. A page that named qa/predict.py, or a flag --doc-stride, would fail.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from qa.options import DEMO_BERT, DEMO_LLAMA, BertOptions, EvaluateOptions, LlamaOptions, flag, parse

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
SCRIPTS = {"train_bert.py": (BertOptions, DEMO_BERT), "train_llama.py": (LlamaOptions, DEMO_LLAMA),
           "evaluate.py": (EvaluateOptions, None)}
THEIRS = {"run_qa.py", "--no-deps", "--nproc_per_node"}  # transformers', pip's, torchrun's


def text_of(page: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.replace("\\\n", " ").replace(" -->", "")  # a command over two lines, or in a comment


def files(text: str) -> set[str]:
    return set(re.findall(r"[\w/-]+\.(?:py|md|txt|toml)\b", text)) - THEIRS


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - THEIRS


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, its flags), wherever a script is followed by any."""
    return [(script, shlex.split(rest)) for script, rest in re.findall(r"\b(train_bert\.py|train_llama\.py|evaluate\.py)"
                                                                       r"( --[^`#\n|]*)", text)]


def test_worked_case():
    line = "python train_bert.py --demo"
    assert (files(line), flags(line), commands(line)) == ({"train_bert.py"}, {"--demo"}, [("train_bert.py", ["--demo"])])
    assert line in text_of("README.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    """With its folder; or without it, in whichever."""
    names = {path.name for folder in ("qa", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.*")}
    assert [name for name in files(text_of(page)) if not (ROOT / name).is_file() and name not in names] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_is_named_is_one_of_a_script_or_a_benchmark(page):
    known = {flag(name) for cls, _ in SCRIPTS.values() for name in cls.__dataclass_fields__}
    known |= {name for path in (ROOT / "benchmarks").glob("*.py") for name in re.findall(r'add_argument\("(--[\w-]+)"',
                                                                                        path.read_text())}
    assert flags(text_of(page)) - known == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_command_can_be_parsed(page):
    for script, argv in commands(text_of(page)):
        cls, demo = SCRIPTS[script]
        parse(cls, "", demo, argv)
