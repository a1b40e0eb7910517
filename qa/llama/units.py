"""A passage cut into units and chunks: where a span of it may begin and end.

    passage   The tower (1889) is
    units     The | tower | ( | 1889 | ) | is     a span begins where a unit begins, and ends where one ends
    chunks    The | tower | (1889) | is           what stands between two blanks

What a unit is, a pattern says: exact decoding has a finer one than grounding. Used by: candidates.py, grounding.py.
"""

from __future__ import annotations

import functools
import re

PARTS = re.compile(r"[^\W\d_]+|\d+|[^\w\s]|_")  # "1889ish" has two: letters, digits, any other character by itself
WORDS = re.compile(r"\w+|[^\w\s]")  # "1889ish" is one


class Units:
    """The U units of a text."""

    def __init__(self, text: str, pattern: re.Pattern[str]):
        self.text = text
        spans = [match.span() for match in pattern.finditer(text)]
        self.starts = [start for start, _ in spans]  # [U]
        self.ends = [end for _, end in spans]  # [U] exclusive
        firsts = [unit for unit, (start, _) in enumerate(spans) if unit == 0 or start > spans[unit - 1][1]]
        self.chunks = list(zip(firsts, [*firsts, len(spans)][1:], strict=True))  # units [first, stop) of each chunk
        self.chunk_stop = [stop for first, stop in self.chunks for _ in range(first, stop)]  # [U] of the unit's chunk

    def string(self, first: int, last: int) -> str:
        """The units first..last (inclusive), as they stand in the text."""
        return self.text[self.starts[first] : self.ends[last]]


cut = functools.lru_cache(maxsize=8)(Units)  # questions on one passage come one after another
