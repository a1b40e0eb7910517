"""python -m qa.ask: a user's documents, questions, answers with file and line; in this process, with tiny models.

One worked case: asked about a folder with one file, it prints an answer, marked in its sentence, and "skerry.md:3".
"""

from __future__ import annotations

import io
import json
import re
from types import SimpleNamespace

import pytest

from qa.ask import main, split_words
from qa.errors import UserError, exit_status

SKERRY = "# Skerry\n\nThe lighthouse was lit in 1844.\n\nIts keeper, Ann Doull, stayed for thirty years. She died in 1901.\n"
BERT = ["--precision", "fp32", "--max-length", "64", "--overlap", "16", "--max-answer-length", "5"]
QUESTION = "When was the lighthouse lit?"


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "skerry.md").write_text(SKERRY)
    (folder / "other.txt").write_text("Nothing here.")
    return folder


@pytest.fixture
def ask(tiny_bert_folder, monkeypatch, capsys):
    def run(*words: str, status: int = 0, stdin: str = "", model=tiny_bert_folder, flags=BERT) -> SimpleNamespace:
        monkeypatch.setattr("sys.argv", ["ask", "--ckpt", str(model), *flags, *words])
        file = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
        monkeypatch.setattr("sys.stdin", file)
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True))
        found = exit_status(main)
        out = __import__("sys").stdout.buffer.getvalue().decode()
        err = capsys.readouterr().err
        assert found == status, err
        return SimpleNamespace(out=out, err=err, last=err.strip().splitlines()[-1])

    return run


def test_worked_case(ask, docs):
    """Which words a random head takes, nobody knows; but they stand in the file, at the line that is named."""
    said = ask(str(docs / "skerry.md"), QUESTION)
    shown = re.match(r"1\. (.+)    evidence -?\d+\.\d\d, confidence [\d.e-]+    \S+skerry\.md:([135])\n     (.*)\n", said.out)
    text, line, sentence = shown.groups()
    assert text.split()[0] in SKERRY.splitlines()[int(line) - 1] and f"[[{' '.join(text.split())}]]" in sentence
    assert "2 paragraphs of 1 file" in said.err and "its head is random" in said.err


def test_json_has_a_line_for_each_answer_that_points_into_its_passage(ask, docs):
    said = ask("--json", "--top", "5", str(docs), QUESTION)
    found = [json.loads(line) for line in said.out.splitlines()]
    assert [one["rank"] for one in found] == list(range(1, len(found) + 1)) and 2 <= len(found) <= 5
    evidence = [one["evidence"] for one in found]
    assert evidence == sorted(evidence, reverse=True)
    for one in found:
        assert one["question"] == QUESTION and one["passage"][one["start_char"]:one["end_char"]] == one["text"]
        with open(one["file"]) as file:
            line = file.read().splitlines()[one["line"] - 1]
        assert one["text"].split()[0] in line and one["no_answer"] is False and 0 < one["confidence"] < 1


def test_no_answer_is_said(ask, docs):
    said = ask("--may-refuse", "--na-threshold", "-1000", str(docs), QUESTION)
    assert said.out.startswith("no answer in 3 paragraphs of 2 files. The nearest:\n1. ")
    found = [json.loads(line) for line in
             ask("--json", "--may-refuse", "--na-threshold", "-1000", str(docs), QUESTION).out.splitlines()]
    assert all(one["no_answer"] for one in found)


def test_asks_again_and_again_and_a_bad_question_ends_nothing(ask, docs):
    said = ask(str(docs), stdin=f"{QUESTION}\n\n{'Who ' * 100}\nWho was the keeper?\n", status=2)
    assert said.out.startswith(f"Q: {QUESTION}\n1. ") and "\n\nQ: Who was the keeper?\n1. " in said.out
    assert said.out.count("1. ") == 2 and said.err.count("paragraphs of 2 files") == 1
    assert "expected at most" in said.last


def test_documents_from_standard_input(ask):
    assert "    -:3\n" in ask("-", QUESTION, stdin=SKERRY, flags=[*BERT, "--top", "9"]).out


def test_a_llama_answers_with_a_span_of_the_document(ask, docs, tiny_llama_folder):
    flags = ["--precision", "fp32", "--prompt", "plain", "--max-length", "128", "--max-answer-length", "6"]
    first = ask("--json", str(docs), QUESTION, model=tiny_llama_folder, flags=flags).out
    found = [json.loads(line) for line in first.splitlines()]
    assert len(found) == 3 and all(one["text"] in one["passage"] for one in found)
    again = ask("--json", str(docs), QUESTION, model=tiny_llama_folder, flags=[*flags, "--cache-mb", "0"]).out
    assert [one["text"] for one in found] == [json.loads(line)["text"] for line in again.splitlines()]
    greedy = ask(str(docs), QUESTION, model=tiny_llama_folder, flags=[*flags, "--decode", "greedy"])
    assert "skerry.md" in greedy.out or "no answer" in greedy.out


@pytest.mark.parametrize("words, expected", [
    (["{docs}/gone.md", QUESTION], "gone.md: no such file or folder"), (["gone", QUESTION], "gone: no such file"),
    ([QUESTION], "no such file or folder"), ([], "no documents"), (["{docs}/gone.md"], "gone.md: no such file"),
    (["{docs}/gone/"], "gone/: no such file"), (["{docs}", " "], "the question is ' '"),
    (["{docs}", "Who " * 100], "expected at most"),
    (["-"], "standard input holds the documents"), (["{docs}/empty.md", QUESTION], "no text to read"),
    (["{docs}/binary.txt", QUESTION], "zero bytes"), (["--top", "0", "{docs}", QUESTION], "--top 0"),
    (["--ckpt", "{docs}", "{docs}", QUESTION], "no config.json"), (["--cache-mb", "-1", "{docs}", QUESTION], "--cache-mb -1")])
def test_bad_input_is_one_line(ask, docs, words, expected):
    (docs / "empty.md").write_text("")
    (docs / "binary.txt").write_bytes(b"\0\1")
    said = ask(*(word.replace("{docs}", str(docs)) for word in words), status=2)
    assert said.last.startswith("error: ") and expected in said.last and "Traceback" not in said.err


def test_the_question_is_the_last_word_unless_it_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.md").write_text("x")
    assert split_words(("a.md", "When?")) == (["a.md"], "When?") and split_words(("a.md",)) == (["a.md"], None)
    assert split_words(("a.md", "a.md")) == (["a.md", "a.md"], None) and split_words(("a.md", "-")) == (["a.md", "-"], None)
    assert split_words(("a.md", "Is it in a.md or b.md")) == (["a.md"], "Is it in a.md or b.md")
    with pytest.raises(UserError):
        split_words(("When?",))
