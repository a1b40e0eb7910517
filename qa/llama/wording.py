"""The words of the prompts: what the model is told, how it is asked, and what it learns to write.

docs/results.md tells how INSTRUCTION was chosen. Used by: prompt.py, chat.py, demonstrations.py, encode.py.
"""

from __future__ import annotations

import re

from qa.data.squad import Example

INSTRUCTION = "Read the passage and answer the question with a short phrase copied from it, not a sentence."
REFUSAL = "unanswerable"
REFUSAL_INSTRUCTION = f'If the passage does not answer the question, write "{REFUSAL}".'
CUE = "Answer:"  # the prompt's last words; the model goes on from here


def ask(passage: str, question: str) -> str:
    """A user's turn of the engineered prompt."""
    return f"Passage:\n{passage}\n\nQuestion: {question}"


def answer_text(example: Example) -> str:
    """What the model learns to write: the first answer, or the refusal."""
    return REFUSAL if example.is_impossible else example.answers[0].text


def one_line(text: str) -> str:
    """An answer as it is written. A newline in it would end it, so each becomes a space."""
    return re.sub(r"\s*\n\s*", " ", text.strip())


def space_after(text: str) -> str:
    """What to put before the text that follows: a space, but not after a newline. So no part of a prompt ends in a space."""
    return "" if not text or text.endswith("\n") else " "
