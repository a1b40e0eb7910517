"""One question of a file. The usual shapes of its fields are read; others are faults, named by their type.

    answers         [{"text": "1871", "answer_start": 33}]       the official form; answer_start may be "33" or 33.0 too
                    {"text": ["1871"], "answer_start": [33]}     the hub's
                    {"text": "1871", "answer_start": 33}         one answer
                    [], {}, null, [{"text": ""}], [{"text": null}]    no answer
    id              a text or a number; it may be missing, or another question may have it too: squad.py makes it unique
    is_impossible   true, "True", "1", 1; if it is missing or null, the answers decide

Half a surrogate pair ("\\ud83d" without its other half), which no tokenizer accepts, becomes U+FFFD: one character for one, so
offsets stay right. Used by: squad.py, which checks the answers against the passage.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

NOTHING = (None, "", {}, [])
FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
HALF_PAIR = re.compile("[\ud800-\udfff]")


class Claim(NamedTuple):
    """An answer as the file claims it; squad.py verifies it."""

    text: str
    start_char: int | None  # None: the file does not say


@dataclass(slots=True)
class Question:
    """What a file says about one question."""

    id: str  # "" if the file does not say
    text: str
    claims: list[Claim]
    is_impossible: bool | None  # None: the file does not say
    faults: list[str]  # what cannot be read
    has_half_pair: bool  # in one of its texts, before it was replaced

    def answers(self) -> list[Claim]:
        """The claims with a text: some files write "" for "no answer"."""
        return [claim for claim in self.claims if claim.text.strip()]


def read_question(qa: dict) -> Question:
    """Read a question object. The caller made sure that its `question` is a text."""
    faults: list[str] = []
    claims, is_impossible = _claims(qa.get("answers"), faults), _flag(qa.get("is_impossible"), faults)
    question_id = str(qa["id"]) if isinstance(qa.get("id"), str | int | float) else ""
    texts = [question_id, qa["question"], *(claim.text for claim in claims)]
    whole_id, whole_question, *whole_answers = whole = [replace_half_pairs(text) for text in texts]
    claims = [claim._replace(text=text) for claim, text in zip(claims, whole_answers, strict=True)]
    return Question(whole_id if whole_id.strip() else "", whole_question, claims, is_impossible, faults, whole != texts)


def replace_half_pairs(text: str) -> str:
    return HALF_PAIR.sub("\N{REPLACEMENT CHARACTER}", text)


def is_v2_version(version: object) -> bool:
    """ "v2.0", "2.0", 2, "SQuAD v2.0", "V2.0-dev" are; "1.1" is not, nor are the dates "2023-05-01" and "2.5.2023"."""
    return isinstance(version, str | int | float) and re.fullmatch(
        r"(squad[\s_-]*)?v?2(\.\d){0,2}[^\d.]*", str(version).strip().lower()) is not None


def _claims(answers: object, faults: list[str]) -> list[Claim]:
    claims = []
    for answer in answers if isinstance(answers, list) else [answers]:
        if answer in NOTHING:
            continue
        if not isinstance(answer, dict):
            faults.append(f"answer of the type {type(answer).__name__}")
        elif "text" not in answer:
            faults.append("answer without the field text")
        else:
            texts, starts = (value if isinstance(value, list) else [value]
                             for value in (answer["text"], answer.get("answer_start")))
            for text, start in zip_longest(texts, starts[:len(texts)]):
                if isinstance(text, str):
                    claims.append(Claim(text, _start(start, faults)))
                elif text is not None:
                    faults.append(f"answer whose text is of the type {type(text).__name__}")
    return claims


def _start(value: object, faults: list[str]) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,18}(\.0*)?\s*", value):
        return int(float(value))
    if value not in NOTHING:
        faults.append(f"answer_start of the type {type(value).__name__} that is no whole number")
    return None


def _flag(value: object, faults: list[str]) -> bool | None:
    spelled = "" if isinstance(value, list | dict) else str(value).strip().lower()
    if value is not None and spelled not in FLAGS:
        faults.append(f"is_impossible of the type {type(value).__name__} that is neither true nor false")
    return FLAGS.get(spelled)
