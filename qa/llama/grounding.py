"""Generated text → a span of the passage, with its offset.

A model may write "denver bronco" where the passage has "Denver Broncos". The text is replaced by the first of

    exact       itself, if the passage has it: the first place that cuts no unit, else the first place
    normalised  the shortest, then earliest, span that is equal to it for the official metric (case, ASCII punctuation,
                articles, spaces), as the passage has it
    repaired    the span with the best token F1; of several the one with the fewest character edits (Levenshtein),
                then the earliest, then the shortest. If no span has a token of the text, edits alone decide

or, if the text or the passage is empty, by "" without offsets (empty).

A span begins where a large unit begins and ends where one ends (units.py): "(AFC-winner)" has the units ( AFC - winner ).
F1 is the official one (evaluation/metrics.py) between the n tokens of the text and the m tokens of the span:

    F1 = 2 c / (n + m),   c <= min(n, m) tokens in common, as multisets

Why few spans need to be scored: one common token alone gives F1 = 2 / (n + 1), and m > n^2 tokens give at most
2 n / (n + m) < 2 n / (n + n^2) = 2 / (n + 1). So no best span has more than n^2 tokens (articles and ASCII punctuation
are no tokens), and none has more than 2 n / b - n once F1 = b is reached. Nor does a best span begin or end with a token
that the text lacks: without that token c is the same and m is smaller. ASCII punctuation at the edges changes no token;
so the search uses *solid* units only, those with another character. Only the edits look at the punctuation beside them.

Input: text from greedy.py. Used by: llama/reader.py. scoring.py counts how many answers were of each kind.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qa.evaluation.metrics import normalize_answer
from qa.llama.units import LARGE_UNITS, Units, cut


@dataclass(frozen=True, slots=True)
class Grounded:
    """`passage[start_char:end_char] == text`, `end_char` exclusive; both are None if the kind is "empty"."""

    text: str
    start_char: int | None
    end_char: int | None
    kind: str  # "exact", "normalised", "repaired" or "empty"


@functools.lru_cache(maxsize=1 << 13)
def _tokens(part: str) -> list[str]:
    """The official tokens of a word (what is between two spaces), or of a part of one.

    Normalisation treats each word alone. So a span's tokens are those of its part of the first word, of the whole words
    between, and of its part of the last word.
    """
    return normalize_answer(part).split()


def ground(text: str, passage: str) -> Grounded:
    """Find `text`, or the span nearest to it, in `passage`."""
    text, units = text.strip(), cut(passage, LARGE_UNITS)
    if not text or not units.starts:
        return Grounded("", None, None, "empty")
    start = units.find(text)  # "art" in "an art" rather than in "a part"
    start = start if start >= 0 else passage.find(text)
    kind, end = "exact", start + len(text)
    if start < 0:
        normalised = normalize_answer(text)
        solid = [unit for unit in range(len(units)) if units.string(unit, unit).strip(string.punctuation)]
        spans = best_f1_spans(units, solid, normalised.split())
        equal = [(units.starts[first], units.ends[last]) for first, last in spans
                 if normalize_answer(units.string(first, last)) == normalised]
        if equal:
            kind, (start, end) = "normalised", min(equal, key=lambda span: (span[1] - span[0], span))
        else:
            kind, (start, end) = "repaired", _fewest_edits(text, units, solid, spans)
    return Grounded(passage[start:end], start, end, kind)


def plain_best_f1_spans(units: Units, solid: list[int], text_tokens: list[str]) -> list[tuple[int, int]]:
    """The spans (first unit, last unit) of solid units with the best F1, in order: all are scored. None if that F1 is 0."""
    f1s = {}
    for first, last in itertools.combinations_with_replacement(solid, 2):
        tokens = normalize_answer(units.string(first, last)).split()
        num_common = (Counter(tokens) & Counter(text_tokens)).total()
        f1s[first, last] = 2 * num_common / max(len(tokens) + len(text_tokens), 1)
    best_f1 = max(f1s.values(), default=0.0)
    return [span for span, f1 in f1s.items() if 0 < f1 == best_f1]


def best_f1_spans(units: Units, solid: list[int], text_tokens: list[str]) -> list[tuple[int, int]]:
    """The same; few spans are scored."""
    n, wanted, best_f1, best = len(text_tokens), Counter(text_tokens), 0.0, []
    limit, beginnings = n * n, {token[:size] for token in wanted for size in range(len(token) + 1)}
    for first, unit in enumerate(solid):
        if _cannot_begin(_tokens(units.string(unit, unit)), wanted, beginnings):
            continue
        for last, num_common, num_tokens in _promising_spans(units, solid, first, wanted, beginnings, limit):
            f1 = 2 * num_common / (n + num_tokens)  # one fraction, rounded once: equal F1s are equal floats
            if f1 > best_f1:
                best_f1, best = f1, []
                limit = min(limit, int(2 * n / f1 - n + 1e-9))
            if f1 == best_f1:
                best.append((solid[first], solid[last]))
    return best


def _cannot_begin(tokens: list[str], wanted: Counter, beginnings: set[str]) -> bool:
    """Whether no best span begins with a word, or a part of one, that has these tokens.

    Further characters let the first token grow, but for 2 characters ("x–th" + "e" ends in an article). `beginnings`: of the
    wanted tokens.
    """
    return bool(tokens) and tokens[0] not in wanted and (len(tokens) > 1 or tokens[0][:-2] not in beginnings)


def _promising_spans(units: Units, solid: list[int], first: int, wanted: Counter, beginnings: set[str],
                     limit: int) -> Iterator[tuple[int, int, int]]:
    """(last, c, m) of the spans that begin with unit solid[first], end with solid[last], and might be best."""
    left, num_common, num_tokens = dict(wanted), 0, 0  # left: not found yet
    while first < len(solid) and num_tokens <= limit:  # a word; of the first one, what is left of it
        stop = bisect.bisect_left(solid, units.word_stops[solid[first]])
        for last in range(first, stop):
            tokens = _tokens(units.string(solid[first], solid[last]))
            if num_tokens == 0 and _cannot_begin(tokens, wanted, beginnings):
                return
            if num_tokens + len(tokens) > limit + 1:
                return  # a longer part has as many tokens or more, unless one of them becomes an article
            if not tokens or tokens[-1] in wanted:
                more = sum(min(tokens.count(token), left.get(token, 0)) for token in set(tokens))
                if num_common + more > 0 and num_tokens + len(tokens) <= limit:
                    yield last, num_common + more, num_tokens + len(tokens)
        if num_tokens == 0 and tokens and tokens[0] not in wanted:
            return
        for token in tokens:
            if left.get(token, 0) > 0:
                left[token], num_common = left[token] - 1, num_common + 1
        num_tokens += len(tokens)
        first = stop


def _fewest_edits(text: str, units: Units, solid: list[int], spans: list[tuple[int, int]]) -> tuple[int, int]:
    """The span with the fewest edits from `text`; punctuation beside a span may be added. [start_char, end_char).

    Of equals the earliest, then the shortest. If there are no `spans`: of all spans of the passage.
    """
    if not spans:
        distance, starts = edit_table(text, units.text, units.starts)
        return min((distance[end], starts[end], end) for end in units.ends)[1:]
    before = dict(zip(solid, [-1, *solid], strict=False))  # the solid units next to each
    after = dict(zip(solid, [*solid[1:], len(units)], strict=True))
    found = []
    for first, group in itertools.groupby(spans, key=lambda span: span[0]):
        starts = units.starts[before[first] + 1 : first + 1]
        ends = [end for _, last in group for end in units.ends[last : after[last]]]
        distance, nearest = edit_table(text, units.text[starts[0] : ends[-1]], [start - starts[0] for start in starts])
        found += [(distance[end - starts[0]], starts[0] + nearest[end - starts[0]], end) for end in ends]
    return min(found)[1:]


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
