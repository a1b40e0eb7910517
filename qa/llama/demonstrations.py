"""Demonstrations (--shots): training questions with their answers, shown in the engineered prompt before the real question.

Input: Passages. Used by: train_llama.py and qa/reader.py, which hand them to PromptTemplate.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from qa.data.squad import Example, Passage
from qa.errors import UserError
from qa.llama.wording import answer_text, one_line


@dataclass(frozen=True)
class Demonstration:
    passage: str
    question: str
    answer: str  # the refusal for an unanswerable question


def choose_demonstrations(passages: Sequence[Passage], shots: int, seed: int) -> tuple[Demonstration, ...]:
    """`shots` training questions, each on another text; the texts are from the shorter half."""
    examples_by_text: dict[str, list[Example]] = {}
    for passage in passages:
        if trainable := [example for example in passage.examples if example.trainable]:
            examples_by_text.setdefault(passage.text, []).extend(trainable)
    short = sorted(examples_by_text, key=len)[: (len(examples_by_text) + 1) // 2]
    if shots > len(short):
        raise UserError(f"--shots {shots}: more than the training data has to offer, the shorter half of its "
                        f"{len(examples_by_text)} passages; give at most {len(short)}")
    rng = random.Random(seed)
    chosen = [(text, rng.choice(examples_by_text[text])) for text in rng.sample(short, shots)]
    return tuple(Demonstration(text, example.question.strip(), one_line(answer_text(example))) for text, example in chosen)
