"""What a reader says to a data set: plain data, the same for BERT and LLaMA.

    Reader.answer(data) -> Answered, whose predictions are one `Prediction` a question, in the order of `data.examples`

Made by bert/reader.py and llama/reader.py. Used by evaluation/ (scores, files, marked passages), training/evaluator.py
and qa/asking.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from qa.data.squad import SquadData


@dataclass(slots=True)  # a frozen one takes four times as long to make
class Candidate:
    """A span of the passage: `passage[start_char:end_char] == text`."""

    text: str
    start_char: int
    end_char: int  # exclusive
    score: float  # BERT: start score + end score; LLaMA: log P of writing the text and its end
    confidence: float


@dataclass(slots=True)
class Prediction:
    """What a model says to one question."""

    id: str
    text: str  # the best span; "" if the passage has none. `scoring.final_answers` applies the no-answer threshold
    candidates: list[Candidate]  # distinct spans, best first
    no_answer_score: float | None = None  # v2.0: larger means "no answer"
    null_score: float | None = None  # of giving no answer, on the scale of the candidates' scores; LLaMA: v2.0 only
    null_confidence: float | None = None  # v2.0
    raw_text: str | None = None  # LLaMA, greedy: what it wrote, before grounding
    grounding: str | None = None  # LLaMA, greedy: exact, normalised, repaired, empty, or refused (v2.0)


@dataclass
class Answered:
    predictions: list[Prediction]
    notes: list[str] = field(default_factory=list)  # what was cut, skipped or guessed: to be printed
    work: list[str] = field(default_factory=list)  # what finding the answers took: to be printed
    conditions: dict[str, Any] = field(default_factory=dict)  # beside the settings: what the figures depend on


class Reader(Protocol):
    """A model with all that it needs to answer questions. All ranks call `answer`: each predicts its share."""

    def answer(self, data: SquadData) -> Answered: ...
