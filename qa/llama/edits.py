"""Levenshtein's distance, from a text to many parts of a passage at once: the insertions, deletions and replacements.

    edits_to_beginnings     to the parts that begin where the passage does
    edit_table              to the parts that begin at any of given places

Used by: grounding.py.
"""

from __future__ import annotations

import numpy as np


def edits_to_beginnings(text: str, passage: str) -> list[int]:
    """Levenshtein's distances of `text` (T characters) from passage[:0], passage[:1], ..., passage[:C], in C steps.

    Between two rows of a column of Levenshtein's table is a difference of 1, 0 or -1. A column is two integers of T bits, which
    say where it is 1 and where -1; one addition carries through a run of equal characters: Myers 1999 (J. ACM 46(3)), as Hyyro
    2001 writes it, whose D0, HP, HN, VP, VN are `zero`, `right_plus`, `right_minus`, `plus` and `minus`.
    """
    equal, ones = {}, (1 << len(text)) - 1
    for place, character in enumerate(text):
        equal[character] = equal.get(character, 0) | 1 << place
    distances, plus, minus = [len(text)], ones, 0  # the first column counts 1, 2, ..., T
    for character in passage:
        eq = equal.get(character, 0)
        zero = ((eq & plus) + plus ^ plus) | eq | minus  # as the cell up and left of it
        right_plus, right_minus = minus | ~(zero | plus) & ones, plus & zero  # against the column before
        distances.append(distances[-1] + (right_plus >> len(text) - 1 & 1) - (right_minus >> len(text) - 1 & 1))
        right_plus, right_minus = right_plus << 1 | 1, right_minus << 1
        plus, minus = (right_minus | ~(zero | right_plus)) & ones, right_plus & zero & ones
    return distances


def edit_table(text: str, passage: str, starts: list[int]) -> tuple[list[int], list[int]]:
    """For every end (exclusive) in `passage`, the nearest span that ends there: edits from `text`, and start.

    Levenshtein's table, where a span may begin at any of `starts` at no cost (Sellers 1980, J. Algorithms 1):

        row_i[j] = min(row_i-1[j] + 1,  row_i[j-1] + 1,  row_i-1[j-1] + (text[i] != passage[j]))

    One integer, distance * scale + start, carries both, so that a minimum is the nearest, then the earliest.
    """
    codes, text_codes = np.array([*map(ord, passage)]), [*map(ord, text)]  # [C], [T]
    begin, scale = np.array(starts), len(codes) + 1
    insertions = scale * np.arange(len(codes) + 1)  # [C + 1]
    row = np.full(len(codes) + 1, scale * (len(codes) + len(text) + 2))  # [C + 1] further than any span
    row[begin + 1] = scale + begin  # spans of one character, against no text
    row = np.minimum.accumulate(row - insertions) + insertions
    for i, code in enumerate(text_codes):
        above, replaced = row, scale * (codes != code)  # [C + 1], [C]
        row = above + scale
        row[1:] = np.minimum(row[1:], above[:-1] + replaced)
        row[begin + 1] = np.minimum(row[begin + 1], scale * i + replaced[begin] + begin)  # begin here
        row = np.minimum.accumulate(row - insertions) + insertions
    return (row // scale).tolist(), (row % scale).tolist()
