"""Single questions: the groups of the breakdowns, and what is marked in a passage.

    breakdowns   "who", "when"; an answer of "4–5 words"; the annotators "all agree": group -> questions
    segments     a passage, cut where a mark begins or ends

Used by: plots.py (breakdowns), page.py (the questions where two systems differ).
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from typing import NamedTuple

from qa.data.squad import Example, SquadData, find_answer
from qa.errors import UserError
from qa.evaluation.metrics import normalize_answer
from qa.files import read_json
from qa.reporting.systems import Evaluation
from qa.schema import OBJECT, list_of, object_of

WORDS = ["who", "what", "which", "when", "where", "why", "how many", "how", "other"]
QUESTION_WORD = re.compile(r"\b(how many|how much|how|who|whom|whose|when|where|which|why|what)\b", re.IGNORECASE)
SAME_WORD = {"whose": "who", "whom": "who", "how much": "how many"}
ANSWER_WORDS = {1: "1 word", 2: "2 words", 3: "3 words", 5: "4–5 words", 10: "6–10 words", math.inf: "over 10 words"}  # up to
PASSAGE_WORDS = {74: "under 75 words", 99: "75–99 words", 124: "100–124 words", 149: "125–149 words", 199: "150–199 words",
                 math.inf: "200 words or more"}
AGREEMENT = ("all agree", "most agree", "no majority", "only one answer")
NO_ANSWER = "no answer"
AROUND = 300  # characters shown before the first mark and after the last one


class Question(NamedTuple):
    passage: str
    example: Example


def find_questions(ids: list[str], data: SquadData) -> list[Question]:
    """The question of each id."""
    known = {example.id: Question(passage.text, example) for passage in data.passages for example in passage.examples}
    if missing := [question_id for question_id in ids if question_id not in known]:
        raise UserError(f"--data {data.source}: lacks {len(missing):,} of the {len(ids):,} questions (first: {missing[0]}); "
                        "give the data that the evaluations are of")
    return [known[question_id] for question_id in ids]


def breakdowns(questions: list[Question]) -> dict[str, dict[str, list[int]]]:
    """{title: {group: rows of its questions}}, in an order to read them in, without empty groups."""
    found = {}
    for title, (group_of, order) in BREAKDOWNS.items():
        rows: dict[str, list[int]] = {group: [] for group in order}
        for row, question in enumerate(questions):
            rows[group_of(question)].append(row)
        found[title] = {group: members for group, members in rows.items() if members}
    return found


def question_word(question: Question) -> str:
    """The first one: "In which year did the man who ..." -> "which"."""
    found = QUESTION_WORD.search(question.example.question)
    return SAME_WORD.get(found[1].lower(), found[1].lower()) if found else "other"


def answer_length(question: Question) -> str:
    golds = question.example.gold_texts
    return _up_to(ANSWER_WORDS, len(golds[0].split())) if golds else NO_ANSWER


def passage_length(question: Question) -> str:
    return _up_to(PASSAGE_WORDS, len(question.passage.split()))


def _up_to(labels: dict[float, str], value: int) -> str:
    return next(label for most, label in labels.items() if value <= most)


def agreement(question: Question) -> str:
    """Of the gold answers, once they are normalised."""
    golds = Counter(map(normalize_answer, question.example.gold_texts))
    if golds.total() < 2:
        return AGREEMENT[3] if golds else NO_ANSWER
    largest = max(golds.values())
    return AGREEMENT[0] if largest == golds.total() else AGREEMENT[1] if 2 * largest > golds.total() else AGREEMENT[2]


BREAKDOWNS = {  # title: function, its groups in order
    "Question word": (question_word, WORDS), "Length of the answer": (answer_length, [*ANSWER_WORDS.values(), NO_ANSWER]),
    "Length of the passage": (passage_length, PASSAGE_WORDS.values()),
    "Agreement of the annotators": (agreement, [*AGREEMENT, NO_ANSWER])}


def best_spans(evaluation: Evaluation) -> dict[str, tuple[str, int | None]] | None:
    """{id: text and start_char of the best span, whether refused or not}, from nbest.json; None: there is no such file."""
    path = evaluation.folder / "nbest.json"
    if not path.is_file():
        return None
    if not object_of(list_of(OBJECT)).holds(content := read_json(path, "the best answers to each question")):
        raise UserError(f"{path}: expected {{id: [answers]}}, as evaluate.py writes it; evaluate again")
    best = {key: next((entry for entry in entries if entry.get("text")), {}) for key, entries in content.items()}
    return {key: (str(entry.get("text", "")), entry.get("start_char")) for key, entry in best.items()}


def answer_span(question: Question, answer: str | None, best: tuple[str, int | None]) -> tuple[int, int] | None:
    """[start_char, end_char) of an answer in its passage; None where that is not known."""
    claimed = best[1] if best[0] == answer else None
    start = find_answer(question.passage, answer, claimed if isinstance(claimed, int) else None) if answer else None
    return None if start is None else (start, start + len(answer))


def segments(passage: str, marks: dict[str, list[tuple[int, int]]]) -> list[tuple[str, list[str]]]:
    """The passage around its marks, in parts: (text, the names of the marks on it). marks: name -> [start_char, end_char).

    segments("lit in 1844", {"gold": [(7, 11)], "a": [(4, 11)]}) -> [("lit ", []), ("in ", ["a"]), ("1844", ["gold", "a"])]
    """
    spans = [span for places in marks.values() for span in places]
    first, last = min((start for start, _ in spans), default=0), max((end for _, end in spans), default=0)
    begin = min(passage.find(" ", first - AROUND) + 1, first) if first > AROUND else 0  # between two words
    end = max(passage.rfind(" ", 0, last + AROUND), last) if last + AROUND < len(passage) else len(passage)
    edges = sorted({begin, end, *(edge for span in spans for edge in span)})
    parts = [(passage[start:stop], [name for name, places in marks.items() if any(low <= start < high for low, high in places)])
             for start, stop in itertools.pairwise(edges)]
    return [("… ", [])] * (begin > 0) + parts + [(" …", [])] * (end < len(passage))
