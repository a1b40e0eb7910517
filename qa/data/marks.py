"""Marks: characters that belong to the character before them. A predicted answer does not end before one.

"dé" may be written as d, e and U+0301, an accent: three characters, and the last is a mark. Other marks are the vowel signs of
Hindi and Arabic, and an emoji's skin colour. Used by: bert/windows.py, llama/units.py.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np

FIRST_MARK = 0x300  # no character before it is a mark
JOINER = "\N{ZERO WIDTH JOINER}"  # makes one sign of two emojis; between letters it is a matter of the script
# Marks that Unicode calls something else: Thai and Lao AM, narrow katakana's voiced marks, skin colours, a flag's letters
MORE_MARKS = re.compile("[\u0e33\u0eb3\uff9e\uff9f\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")


def is_mark(character: str) -> bool:
    """Whether the character always belongs to the one before it. JOINER depends on its neighbours: False."""
    return unicodedata.category(character)[0] == "M" or MORE_MARKS.match(character) is not None


def ends_after_marks(offsets: np.ndarray, text: str) -> np.ndarray:
    """Move every end after the marks that follow it; [tokens, 2], start and end (exclusive) characters.

    A tokenizer may drop accents: of "de\u0301" BERT's uncased one makes the token "de" with the offsets (0, 2). An answer that
    ends with this token would lose its accent. Here the offsets are (0, 3).
    """
    if text.isascii():
        return offsets
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    follows = codes >= FIRST_MARK  # [characters]
    follows[follows] = [_follows(text, place) for place in np.flatnonzero(follows)]
    stops = np.append(np.flatnonzero(~follows), len(text))
    return np.stack([offsets[:, 0], stops[np.searchsorted(stops, offsets[:, 1])]], axis=1).astype(offsets.dtype)


def _follows(text: str, place: int) -> bool:
    """Whether the character at `place` belongs to the one before it: a mark, or a joiner or an emoji that it joins."""
    character, before = text[place], text[max(place - 1, 0):place]
    if JOINER in (character, before):
        joined = text[place + 1:place + 2] if character == JOINER else character
        return unicodedata.category(joined or " ") == "So"
    return is_mark(character)
