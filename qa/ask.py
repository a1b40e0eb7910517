"""Questions to your own documents, answered with spans of them.

    python -m qa.ask --ckpt runs/bert docs/ "When was the lighthouse lit?"     # folders of .txt and .md, or files
    python -m qa.ask --ckpt runs/bert docs/                                    # asks for questions, again and again
    pdftotext report.pdf - | python -m qa.ask --ckpt runs/bert - "Who pays?"   # documents from standard input
    python -m qa.ask --ckpt runs/lora --json --top 5 docs/ "Who pays?"         # one JSON object a line, for programs

The passages are the paragraphs of the documents. The best answers over all of them are shown in their sentences, with file and
line. A confidence is that of the answer within its paragraph; the order is that of the evidence (qa/asking.py says why).

With --json each answer is an object: question, rank, text, confidence, evidence, no_answer (the model finds no answer in any
document; this is the nearest to one), file, line, passage, and start_char and end_char (exclusive), which count in passage.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from qa.asking import Found
from qa.data.documents import Paragraph, read_documents, sentence_span
from qa.data.squad import counted
from qa.errors import UserError, exit_status
from qa.evaluation.show import mark
from qa.flags import parse
from qa.options import AskOptions
from qa.reader import load_reader
from qa.training import distributed

PROMPT = "question: "


def main() -> None:
    options, typed = parse(AskOptions, __doc__)
    if not options.ckpt:
        raise UserError("--ckpt is missing: the model that reads, such as runs/bert")
    names, question = split_words(options.words)
    if question is not None and not question.strip():
        raise UserError(f"the question is {question!r}; expected a text that is not empty")
    if question is None and "-" in names:
        raise UserError("-: standard input holds the documents, so give the question as the last argument")
    paragraphs, passed_over = read_documents(names)
    reader, notes = load_reader(options, typed, distributed.start())
    files = counted(len({paragraph.file for paragraph in paragraphs}), "file")
    notes.remove(reader.precision.reason)  # of use in an evaluation only
    for line in [*(f"warning: {line}" for line in passed_over), *notes, f"{counted(len(paragraphs), 'paragraph')} of {files}"]:
        print(line, file=sys.stderr)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)

    texts, failed = [paragraph.text for paragraph in paragraphs], None
    for text in [question] if question is not None else _typed_questions():
        try:
            found = reader.find(text, texts, options.top, options.decode, options.may_refuse or None)
        except UserError as error:
            failed = error
            if question is None:
                print(f"error: {error}", file=sys.stderr)
            continue
        if options.json:
            for entry in as_objects(text, found, paragraphs):
                print(json.dumps(entry, ensure_ascii=False), flush=True)
        else:
            heading = f"Q: {text}\n" if question is None and not sys.stdin.isatty() else ""
            print(heading + as_text(found, paragraphs, files), end="\n" if question else "\n\n", flush=True)
    if failed:
        raise failed


def split_words(words: tuple[str, ...]) -> tuple[list[str], str | None]:
    """The files and folders, and the question: the last argument, unless it is a file or looks like one."""
    if not words:
        raise UserError("no documents: give files, folders, or - for standard input, and then a question")
    last = words[-1]
    is_name = last == "-" or os.path.exists(last) or (" " not in last and Path(last).suffix) or last.endswith("/")
    if is_name:
        return list(words), None
    if len(words) == 1:
        raise UserError(f"{last!r}: no such file or folder, and a question needs documents before it")
    return list(words[:-1]), last


def _typed_questions() -> Iterator[str]:
    """Questions from the user's terminal, or one a line from a program."""
    try:
        import readline  # noqa: F401  (lets the user edit the line)
    except ImportError:  # Windows
        pass
    while True:
        try:
            question = input(PROMPT if sys.stdin.isatty() else "")
        except EOFError:
            return
        if question.strip():
            yield question


def as_text(found: list[Found], paragraphs: list[Paragraph], files: str) -> str:
    lines = []
    if found[0].no_answer:
        lines.append(f"no answer in {counted(len(paragraphs), 'paragraph')} of {files}. The nearest:")
    for number, one in enumerate(found, start=1):
        answer, paragraph = one.answer, paragraphs[one.passage]
        first, past = sentence_span(paragraph.source, answer.start_char, answer.end_char)
        shown = mark(paragraph.source[first:past], answer.start_char - first, answer.end_char - first)
        lines.append(f"{number}. {answer.text}    evidence {one.evidence:.2f}, confidence {answer.confidence:.2g}    "
                     f"{paragraph.file}:{paragraph.line(answer.start_char)}\n     {' '.join(shown.split())}")
    return "\n".join(lines)


def as_objects(question: str, found: list[Found], paragraphs: list[Paragraph]) -> list[dict]:
    """What --json prints. no_answer: the model finds no answer in any document, and this is the nearest to one."""
    return [{"question": question, "rank": number, "text": one.answer.text, "confidence": one.answer.confidence,
             "evidence": one.evidence, "no_answer": one.no_answer, "file": paragraphs[one.passage].file,
             "line": paragraphs[one.passage].line(one.answer.start_char), "start_char": one.answer.start_char,
             "end_char": one.answer.end_char, "passage": paragraphs[one.passage].text}
            for number, one in enumerate(found, start=1)]


if __name__ == "__main__":
    sys.exit(exit_status(main))
