"""Where a page claims that a command prints something, the command is run and its output compared.

    <!-- file: lighthouse.json -->                       the next fenced block is the content of this file
    <!-- output: python evaluate.py --data lighthouse.json ... -->    the next fenced block is what this command prints

Each command runs in an empty folder that has the page's files. A line "..." in a block is for any number of lines that the
page leaves out. Spaces may differ; numbers may differ by 0.02 and by 5%, since machines round differently.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^<!-- (file|output): (.*?) -->\n+```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def blocks(text: str, kind: str) -> dict[str, str]:
    """{name of the file, or command: contents of the block}"""
    return {name: contents for found, name, contents in BLOCK.findall(text) if found == kind}


def same_line(claimed: str, printed: str) -> bool:
    texts, numbers = zip(*((NUMBER.split(line), NUMBER.findall(line)) for line in (claimed, printed)), strict=True)
    if [text.split() for text in texts[0]] != [text.split() for text in texts[1]]:
        return False
    return all(abs(ours - theirs) <= min(0.02, 0.05 * abs(ours)) + 1e-9
               for ours, theirs in zip(*(map(float, row) for row in numbers), strict=True))


def same_lines(claimed: list[str], printed: list[str]) -> bool:
    if not claimed:
        return not printed
    if claimed[0].strip() == "...":
        return any(same_lines(claimed[1:], printed[num_skipped:]) for num_skipped in range(len(printed) + 1))
    return bool(printed) and same_line(claimed[0], printed[0]) and same_lines(claimed[1:], printed[1:])


def claims() -> list:
    """(page, command) of every block that claims an output; with a model from PyPI where the command names one."""
    found = [(page, command) for page in PAGES for command in blocks((ROOT / page).read_text(encoding="utf-8"), "output")]
    return [pytest.param(page, command, marks=[pytest.mark.weights] if "pypi:" in command or "--demo" in command else [])
            for page, command in found]


def test_worked_case():
    page = ("text\n<!-- file: a.json -->\n```json\n{}\n```\n"
            "<!-- output: python x.py --data a.json -->\n```\n1  -0.50\n...\nend\n```\n")
    assert blocks(page, "file") == {"a.json": "{}\n"}
    assert blocks(page, "output") == {"python x.py --data a.json": "1  -0.50\n...\nend\n"}
    claimed = ["1  -0.50", "...", "end"]
    assert same_lines(claimed, ["1 -0.49", "2 -0.70", "end"]) and same_lines(claimed, ["1 -0.50", "end"])
    assert not same_lines(claimed, ["1 -0.47", "end"]) and not same_lines(claimed, ["1 -0.50", "end", "more"])
    assert same_line("confidence 0.0043", "confidence 0.0042") and not same_line("confidence 0.0043", "confidence 0.0019")
    assert not same_lines(claimed, ["2 -0.50", "end"]) and not same_lines(claimed, ["1 -0.50"])


@pytest.mark.parametrize("page, command", claims())
def test_the_command_prints_what_the_page_claims(page, command, tmp_path):
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, contents in blocks(text, "file").items():
        (tmp_path / name).write_text(contents, encoding="utf-8")
    python, *arguments = shlex.split(command)
    assert python == "python"
    arguments = [str(ROOT / argument) if argument.endswith(".py") else argument for argument in arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    claimed, printed = blocks(text, "output")[command].splitlines(), ended.stdout.splitlines()
    missing = [line for line in claimed if line.strip() != "..." and not any(same_line(line, other) for other in printed)]
    assert not missing, ended.stdout
    assert same_lines(claimed, printed), ended.stdout
