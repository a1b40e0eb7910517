"""A user's own text files, as paragraphs that know their file and line. They are the passages of qa/ask.py.

    # Skerry                                  docs/skerry.md, line 1: a heading goes with the paragraph after it
                                              (an empty line ends a paragraph)
    The lighthouse was lit                    line 3
    in 1844.                                  line 4: the line break becomes a space, so every character keeps its place

Files are UTF-8, with or without a byte-order mark. A paragraph of more than `MOST` characters is cut, at the end of a sentence
if there is one. What is passed over is named. Used by: qa/ask.py.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from qa.errors import UserError

SUFFIXES = (".txt", ".md")
MOST = 2000  # characters of a paragraph: some 400 tokens
SENTENCE_END = re.compile(r"[.!?。!?][\"'”’)\]]*(?=\s|$)|\n\s*\n")
TO_SPACE = str.maketrans("\n\t\v\f", "    ")
HEADING = re.compile(r"#{1,6}\s.*")


@dataclass(frozen=True)
class Paragraph:
    file: str  # as the user wrote it; "-": standard input
    first_line: int  # counted from 1
    source: str  # as in the file

    @property
    def text(self) -> str:
        """`source` on one line, with as many characters."""
        return self.source.translate(TO_SPACE)

    def line(self, char: int) -> int:
        """The file's line that has this character of the paragraph."""
        return self.first_line + self.source.count("\n", 0, char)


def read_documents(names: list[str]) -> tuple[list[Paragraph], list[str]]:
    """The paragraphs of files and folders, and a line for each file that was passed over.

    Of a folder: its .txt and .md files, also in folders inside it; hidden ones are left out.

    Raises:
        UserError: a name that does not exist, or no paragraph at all.
    """
    paragraphs, passed_over = [], []
    for name in names:
        for file in _files(name, passed_over):
            content = b""
            try:
                content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
                text = content.decode("utf-8-sig")
                found = [] if "\0" in text or content.startswith(b"%PDF") else split_paragraphs(file, text)
                reason = "" if found else "not a text file (it has zero bytes)" if "\0" in text else "empty"
            except UnicodeDecodeError as error:
                found, reason = [], f"not UTF-8 text (byte {error.start}); iconv -f latin1 -t utf8 may convert it"
            except OSError as error:
                found, reason = [], f"cannot be read ({error.strerror})"
            paragraphs += found
            if reason and content.startswith(b"%PDF"):
                reason = "a PDF; make text of it, with pdftotext for example"
            if reason:
                passed_over.append(f"{file}: {reason}; passed over")
    if not paragraphs:
        raise UserError(f"no text to read: {passed_over[0]}. Expected UTF-8 text in files, folders of {' and '.join(SUFFIXES)} "
                        "files, or - for standard input")
    return paragraphs, passed_over


def _files(name: str, passed_over: list[str]) -> list[str]:
    path = Path(name)
    if name == "-" or path.is_file():
        return [name]
    if not path.is_dir():
        raise UserError(f"{name}: no such file or folder; expected files and folders first, then one question in quotes")
    found = [str(file) for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file()
             and not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not found:
        passed_over.append(f"{name}: no {' or '.join(SUFFIXES)} file in this folder")
    return found


def split_paragraphs(file: str, text: str) -> list[Paragraph]:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    blocks = [match.span() for match in re.finditer(r"\S[^\n]*(?:\n[^\n]*\S[^\n]*)*", text)]  # runs of lines that are not empty
    paragraphs, begin = [], None
    for start, stop in blocks:
        begin = start if begin is None else begin
        if HEADING.fullmatch(text[start:stop]) and stop != blocks[-1][1]:
            continue  # the next paragraph begins with this heading
        for first, past in _cut(text, begin, begin + len(text[begin:stop].rstrip())):
            paragraphs.append(Paragraph(file, 1 + text.count("\n", 0, first), text[first:past]))
        begin = None
    return paragraphs


def _cut(text: str, begin: int, stop: int) -> list[tuple[int, int]]:
    """Parts of at most `MOST` characters, without spaces at their edges."""
    parts = []
    while stop - begin > MOST:
        ends = [match.end() for match in SENTENCE_END.finditer(text, begin, begin + MOST)]
        space = max(text.rfind(" ", begin, begin + MOST), text.rfind("\n", begin, begin + MOST))
        past = ends[-1] if ends else space if space > begin else begin + MOST
        parts.append((begin, begin + len(text[begin:past].rstrip())))
        begin = past + len(text[past:stop]) - len(text[past:stop].lstrip())
    return [*parts, (begin, stop)]


def sentence_span(text: str, start_char: int, end_char: int, most: int = 300) -> tuple[int, int]:
    """The sentence, or sentences, around a span; at most `most` characters on either side."""
    first, past = max(0, start_char - most), min(len(text), end_char + most)
    before = [match.end() for match in SENTENCE_END.finditer(text, first, start_char)]
    after = SENTENCE_END.search(text, max(end_char - 1, start_char), past)
    return (before[-1] if before else first), (after.end() if after else past)
