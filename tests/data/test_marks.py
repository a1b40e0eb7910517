"""Marks belong to the character before them.

One worked case: the text "de\u0301e\u0301" has five characters, and a token of its first two ends at 2. The character at 2 is
an accent, so the end moves to 3.
"""

from __future__ import annotations

import numpy as np
import pytest

from qa.data.marks import FIRST_MARK, JOINER, ends_after_marks, is_mark


@pytest.mark.parametrize("characters, expected", [
    ("\u0301\u093f\u064e\ufe0f\u20e3", True),  # an accent, vowel signs of Hindi and Arabic, an emoji's form, a keycap
    ("\u0e33\uff9e\U0001f3fd\U000e0067", True),  # Thai AM, a voiced mark of narrow katakana, a skin colour, a flag's letter
    ("a1 .\u00b4\u6771\U0001f44d" + JOINER, False)])
def test_what_is_a_mark(characters, expected):
    assert {is_mark(character) for character in characters} == {expected}


def test_the_first_mark_is_the_first():
    assert min(code for code in range(0x1000) if is_mark(chr(code))) == FIRST_MARK


@pytest.mark.parametrize("text, end, expected", [
    ("de\u0301e\u0301", 2, 3), ("de\u0301e\u0301", 1, 1), ("de\u0301e\u0301", 4, 5), ("dede", 2, 2), ("dédé", 2, 2),
    ("de–de", 2, 2), ("👍🏽👍", 1, 2), ("👍🏽👍", 2, 2), ("👩\u200d🔬 a", 1, 3), ("👩\u200d🔬\u200d🔬 a", 1, 5),
    ("❤\ufe0f\u200d🔥", 1, 4),
    ("क\u094d\u200dष", 1, 2),  # a joiner between letters is no part of the letter before it
    ("a\u200d", 1, 1), ("a\u200db", 1, 1), ("\u0301a", 0, 1), ("", 0, 0)])
def test_an_end_moves_after_the_marks_that_follow_and_no_further(text, end, expected):
    offsets = ends_after_marks(np.array([[0, end]], dtype=np.int32), text)
    assert offsets.tolist() == [[0, expected]] and offsets.dtype == np.int32
