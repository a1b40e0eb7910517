"""A user's text files as paragraphs with file and line.

One worked case: a heading in line 1 and a paragraph in lines 3 and 4 are one passage; "1844" in it is in line 4.
"""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from qa.data.documents import MOST, read_documents, sentence_span, split_paragraphs
from qa.errors import UserError

SKERRY = "# Skerry\n\nThe lighthouse was lit\nin 1844.\n\n\nIts keeper was Ann.\n"


def test_worked_case():
    first, second = split_paragraphs("a.md", SKERRY)
    assert first.text == "# Skerry  The lighthouse was lit in 1844." and first.first_line == 1
    assert first.line(first.text.index("1844")) == 4 and first.line(first.text.index("lighthouse")) == 3
    assert second.text == "Its keeper was Ann." and (second.file, second.first_line) == ("a.md", 7)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_every_kind_of_line_end_and_a_byte_order_mark(tmp_path, newline, bom):
    path = tmp_path / "a.txt"
    path.write_bytes(bom + SKERRY.replace("\n", newline).encode())
    paragraphs, passed_over = read_documents([str(path)])
    assert [one.source for one in paragraphs] == [one.source for one in split_paragraphs("", SKERRY)] and passed_over == []


@pytest.mark.parametrize("text", [
    "word " * 2000, "x" * 5000, "Short one. " * 700, "First line\nof two. " * 400, "a\n\nb " + "c " * 3000, "# only a heading",
    "# a\n\n# b", "", " \n\t\n ", "。" * 4500, "\n\nlate\n", "a" + " " * 2500 + "b"])
def test_no_text_is_lost_and_no_paragraph_is_too_long(text):
    paragraphs = split_paragraphs("f", text)
    assert "".join("".join(one.source.split()) for one in paragraphs) == "".join(text.split())
    lines = text.split("\n")
    for one in paragraphs:
        assert 0 < len(one.source) <= MOST and one.source == one.source.strip() and one.source in text
        assert len(one.text) == len(one.source) and "\n" not in one.text
        assert one.source.split("\n")[0] in lines[one.first_line - 1]


def test_a_long_paragraph_is_cut_at_the_end_of_a_sentence():
    paragraphs = split_paragraphs("f", "This is a sentence. " * 300)
    assert len(paragraphs) > 2 and all(one.source.endswith("sentence.") for one in paragraphs)


def test_folders_files_and_what_is_passed_over(tmp_path):
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    (tmp_path / "in" / ".hidden").mkdir()
    (tmp_path / "in/a.md").write_text("Of a.")
    (tmp_path / "in/deeper/b.TXT").write_text("Of b.")
    (tmp_path / "in/.hidden/c.md").write_text("Of c.")
    (tmp_path / "in/d.pdf").write_text("Of d.")
    (tmp_path / "in/latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "in/zero.txt").write_bytes(b"a\0b")
    (tmp_path / "in/empty.md").write_text(" \n")
    (tmp_path / "in/real.pdf").write_bytes(b"%PDF-1.4 \xe2\xe3")
    (tmp_path / "none").mkdir()
    paragraphs, passed_over = read_documents([str(tmp_path / name) for name in ("in", "none", "in/d.pdf", "in/real.pdf")])
    assert [one.text for one in paragraphs] == ["Of a.", "Of b.", "Of d."]
    assert sorted(line.removeprefix(str(tmp_path)) for line in passed_over) == [
        "/in/empty.md: empty; passed over",
        "/in/latin.txt: not UTF-8 text (byte 3); iconv -f latin1 -t utf8 may convert it; passed over",
        "/in/real.pdf: a PDF; make text of it, with pdftotext for example; passed over",
        "/in/zero.txt: not a text file (it has zero bytes); passed over", "/none: no .txt or .md file in this folder"]


def test_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"Lit in 1844.\n")))
    (paragraph,), _ = read_documents(["-"])
    assert (paragraph.file, paragraph.text) == ("-", "Lit in 1844.")


def test_nothing_to_read_is_an_error(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="gone.md: no such file or folder"):
        read_documents([str(tmp_path / "latin.txt"), "gone.md"])
    with pytest.raises(UserError, match="no text to read: .*latin.txt: not UTF-8"):
        read_documents([str(tmp_path / "latin.txt")])


@pytest.mark.parametrize("text, answer, sentence", [
    ("One. It was lit in 1844 by Ann. Two.", "1844", "It was lit in 1844 by Ann."),
    ("It was lit in 1844.", "1844", "It was lit in 1844."), ("Who? Ann (the keeper.) Then", "Ann", "Ann (the keeper.)"),
    ("One. Two is it. Three.", "One. Two", "One. Two is it."), ("# Head\n\nBy Ann", "Ann", "By Ann"),
    ("no end", "end", "no end")])
def test_the_sentence_of_an_answer(text, answer, sentence):
    start = text.index(answer)
    first, past = sentence_span(text, start, start + len(answer))
    assert text[first:past].strip() == sentence


def test_a_sentence_without_an_end_is_cut():
    first, past = sentence_span("x" * 5000, 2000, 2010, most=100)
    assert (first, past) == (1900, 2110)
