"""One question as a file has it. The usual shapes of its fields are read, others are refused by the name of their type.

    answers         [{"text": "1871", "answer_start": 33}]       the official form; answer_start may be "33" or 33.0 too
                    {"text": ["1871"], "answer_start": [33]}     the hub's
                    {"text": "1871", "answer_start": 33}         one answer
                    [], {}, null, [{"text": ""}], [{"text": null}]    no answer
    id              a text or a number; it may be missing, or that of another question too: squad.py makes it unique
    is_impossible   true, "True", "1", 1; where it is missing or null, the answers tell

Half a surrogate pair ("\\ud83d" without its other half), which no tokenizer takes, becomes U+FFFD: one character for one, so
that offsets stay. Used by: squad.py, which checks what was read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

NOTHING = (None, "", {}, [])
HALF_PAIR = re.compile("[\ud800-\udfff]")


class Claim(NamedTuple):
    """An answer as the file claims it."""

    text: str
    start_char: int | None  # None: the file does not say


@dataclass(slots=True)
class Question:
    """What a file says of one question."""

    id: str  # "" if the file does not say
    text: str
    claims: list[Claim]
    is_impossible: bool | None  # None: the file does not say
    faults: list[str]  # what cannot be read
    has_half_pair: bool  # one of its texts had, before it was replaced

    def answers(self) -> list[Claim]:
        """The claims that say something: "" is how some files write "no answer"."""
        return [claim for claim in self.claims if claim.text.strip()]


def read_question(qa: dict) -> Question:
    """Read a question object, whose `question` is a text."""
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
            faults.append(f"answer of the type {_type(answer)}")
        elif "text" not in answer:
            faults.append("answer without the field text")
        else:
            texts, starts = (value if isinstance(value, list) else [value]
                             for value in (answer["text"], answer.get("answer_start")))
            for text, start in zip_longest(texts, starts[:len(texts)]):
                if isinstance(text, str):
                    claims.append(Claim(text, _start(start, faults)))
                elif text is not None:
                    faults.append(f"answer whose text is of the type {_type(text)}")
    return claims


def _start(value: object, faults: list[str]) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,18}(\.0*)?\s*", value):
        return int(float(value))
    if value not in NOTHING:
        faults.append(f"answer_start of the type {_type(value)} that is no whole number")
    return None


def _flag(value: object, faults: list[str]) -> bool | None:
    if value is None:
        return None
    spelled = str(value).strip().lower() if isinstance(value, (str, bool, int, float)) else ""
    for flag, spellings in ((True, ("true", "1", "1.0")), (False, ("false", "0", "0.0"))):
        if spelled in spellings:
            return flag
    faults.append(f"is_impossible of the type {_type(value)} that is neither true nor false")
    return None


def _type(value: object) -> str:
    return type(value).__name__
