"""A passage cut into units, at whose edges an answer may begin and end.

    passage       The 3rd tower (1889ish, 鉄塔).
    kinds         aaa 1aa aaaaa .1111aaa. cc..     a letter, 1 digit, c letter of a script without spaces, . another character
    SMALL_UNITS   The | 3 | rd | tower | ( | 1889 | ish | , | 鉄 | 塔 | ) | .        for exact decoding
    LARGE_UNITS   The | 3rd | tower | ( | 1889ish | , | 鉄 | 塔 | ) | .              for grounding
    words         The | 3rd | tower | (1889ish, | 鉄塔).                             what is between two spaces

Chinese, Japanese, Thai and others put no spaces between words, so that a run of letters is a clause: there each character is a
unit. A mark (an accent, a vowel sign, an emoji's skin colour) belongs to the unit of the character before it. Python's \\w has
no marks: it would cut "हिन्दी" into six.

Used by: candidates.py, candidates_fast.py, grounding.py.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata

from qa.data.marks import JOINER, is_mark

# As the names of their characters say: "CJK UNIFIED IDEOGRAPH-5854", "HALFWIDTH KATAKANA LETTER KA", "THAI CHARACTER KO KAI".
WITHOUT_SPACES = re.compile(r"IDEOGRAPH|HIRAGANA|KATAKANA|BOPOMOFO|"
                            r"^(THAI|LAO|KHMER|MYANMAR|TIBETAN|YI|(NEW )?TAI|BALINESE|JAVANESE) ")
NON_JOINER = "\N{ZERO WIDTH NON-JOINER}"  # in Persian words; a mark to us

OTHER = r"ff[mj]*|[^ ][mj]*(?:(?<=j)\.[mj]*)*"  # f: half of a flag. A mark after a space is a unit by itself
SMALL_UNITS = re.compile(r"a[amj]*|1[1mj]*|" + OTHER)
LARGE_UNITS = re.compile(r"[a1_][a1_mj]*|" + OTHER)


@functools.cache
def kind(character: str) -> str:
    """One of the letters above; " " for any kind of space, "_" for itself."""
    if character.isspace() or character == "_":
        return character if character == "_" else " "
    if character == JOINER:
        return "j"  # it makes one sign of two emojis; within a word it is a mark as any other
    if is_mark(character) or character == NON_JOINER:
        return "m"
    if character.isdecimal():
        return "1"
    if character.isalnum():
        return "c" if WITHOUT_SPACES.search(unicodedata.name(character, "")) else "a"
    return "f" if "\U0001f1e6" <= character <= "\U0001f1ff" else "."


class Units:
    """The U units of a text. `pattern`: SMALL_UNITS or LARGE_UNITS."""

    def __init__(self, text: str, pattern: re.Pattern[str]):
        self.text = text
        spans = [match.span() for match in pattern.finditer("".join(map(kind, text)))]
        self.starts = [start for start, _ in spans]  # [U]
        self.ends = [end for _, end in spans]  # [U] exclusive
        self._starts, self._ends = set(self.starts), set(self.ends)
        self.word_starts = [unit for unit, (start, _) in enumerate(spans) if unit == 0 or start > spans[unit - 1][1]]
        words = itertools.pairwise([*self.word_starts, len(spans)])
        self.word_stops = [stop for first, stop in words for _ in range(first, stop)]  # [U] where the next word begins

    def __len__(self) -> int:
        return len(self.starts)

    def string(self, first: int, last: int) -> str:
        """The units first..last (inclusive), as the text has them."""
        return self.text[self.starts[first] : self.ends[last]]

    def are_edges(self, start_char: int, end_char: int) -> bool:
        """Whether a unit begins at `start_char`, and one ends at `end_char` (exclusive)."""
        return start_char in self._starts and end_char in self._ends

    def find(self, string: str) -> int:
        """The first place of `string` that begins where a unit begins and ends where one ends; -1: nowhere."""
        start = self.text.find(string)
        while start >= 0 and not self.are_edges(start, start + len(string)):
            start = self.text.find(string, start + 1)
        return start


cut = functools.lru_cache(maxsize=16)(Units)  # questions on one passage come one after another
