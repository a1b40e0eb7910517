"""Generated text → a contiguous span of the passage, with its offset.

A model may answer "denver bronco" where the passage has "Denver Broncos". It is replaced by the first of

    exact       itself, if the passage has it: the first place that cuts no word, else the first place
    normalised  the shortest, then earliest, span that the official metric cannot tell from it (case, ASCII
                punctuation, articles, blanks), as it stands in the passage
    repaired    the span of best token F1; of those the one with the fewest character edits (Levenshtein),
                then the earliest, then the shortest. If no span has a token of the text, edits alone decide

or, if the text or the passage is blank, by "" without offsets (empty).

A span begins where a unit (units.py) begins and ends where one ends: "(AFC-winner)" has the units ( AFC - winner ).
F1 is the official one (evaluation/metrics.py) between the n tokens of the text and the m tokens of the span:

    F1 = 2 c / (n + m),   c <= min(n, m) tokens in common, as multisets

Why the search is short: one common token alone gives F1 = 2 / (n + 1), and m > n^2 tokens give at most
2 n / (n + m) < 2 n / (n + n^2) = 2 / (n + 1). So no best span has more than n^2 tokens (articles and ASCII
punctuation are none), and none has more than 2 n / b - n once F1 = b is reached. Nor does a best span begin
or end with a token that the text lacks: without that token c is the same and m is smaller.

Input: text from generate.py. Used by: predict.py, which also reports how many answers were of each kind.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qa.evaluation.metrics import normalize_answer
from qa.llama.units import WORDS, Units, cut


@dataclass(frozen=True, slots=True)
class Grounded:
    """`context[start_char:end_char] == text`, `end_char` exclusive; both are None if the kind is "empty"."""

    text: str
    start_char: int | None
    end_char: int | None
    kind: str  # "exact", "normalised", "repaired" or "empty"


@functools.lru_cache(maxsize=1 << 15)
def _tokens(string: str) -> list[str]:
    """The official tokens of a part of a chunk.

    Normalisation never looks past a blank, so a span's tokens are those of its part of the first chunk, of the
    whole chunks between, and of its part of the last chunk.
    """
    return normalize_answer(string).split()


def ground(text: str, context: str, max_words: int | None = None) -> Grounded:
    """Find `text`, or the span nearest to it, in `context`.

    Args:
        max_words: the longest span that the search by F1 looks at, in official tokens. None: n^2, which
            leaves out no best span. The search by edits alone has no limit.
    """
    text, units = text.strip(), cut(context, WORDS)
    if not text or not units.starts:
        return Grounded("", None, None, "empty")
    start = units.find(text)  # "art" in "an art" rather than in "a part"
    start = start if start >= 0 else context.find(text)
    kind, end = "exact", start + len(text)
    if start < 0:
        normalised = normalize_answer(text)
        spans = _best_f1_spans(units, normalised.split(), max_words)
        equal = [span for span in spans if normalize_answer(context[slice(*span)]) == normalised]
        if equal:
            kind, (start, end) = "normalised", min(equal, key=lambda span: (span[1] - span[0], span))
        else:
            kind, (start, end) = "repaired", _fewest_edits(text, units, spans)
    return Grounded(context[start:end], start, end, kind)


def _best_f1_spans(units: Units, text_tokens: list[str], max_words: int | None) -> list[tuple[int, int]]:
    """All spans (start_char, end_char) that have the best F1, in order; none if no token is in common."""
    n, wanted, best_f1, best = len(text_tokens), Counter(text_tokens), 0.0, []
    limit = n * n if max_words is None else max_words
    for first in range(len(units.starts)):
        for last, num_common, num_tokens in _promising_spans(units, first, wanted, limit):
            f1 = 2 * num_common / (n + num_tokens)  # one fraction, rounded once: equal F1s are equal floats
            if f1 > best_f1:
                best_f1, best = f1, []
                limit = min(limit, int(2 * n / f1 - n + 1e-9))
            if f1 == best_f1:
                best.append((units.starts[first], units.ends[last]))
    return best


def _promising_spans(units: Units, first: int, wanted: Counter,
                     limit: int) -> Iterator[tuple[int, int, int]]:
    """(last unit, c, m) of the spans that begin with unit `first` and might be best."""
    left, num_common, num_tokens, part = dict(wanted), 0, 0, first  # left: still to be found
    longest = max(map(len, wanted), default=0)
    while part < len(units.starts) and num_tokens <= limit:  # a chunk, or what `first` leaves of it
        for last in range(part, units.chunk_stop[part]):
            tokens = _tokens(units.string(part, last))
            if num_tokens == 0 and tokens and len(tokens[0]) > longest + 2:
                return  # too long, and it only grows (or shrinks by 2: "x–th" + "e" ends in an article)
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
        part = units.chunk_stop[part]


def _fewest_edits(text: str, units: Units, spans: list[tuple[int, int]]) -> tuple[int, int]:
    """The nearest of `spans` by edits, then the earliest, then the shortest; of all spans if it is empty."""
    if len(spans) == 1:
        return spans[0]
    if not spans:
        distance, starts = edit_table(text, units.text, units.starts)
        return min((distance[end], starts[end], end) for end in units.ends)[1:]
    candidates = []
    for start, group in itertools.groupby(spans, key=lambda span: span[0]):
        ends = [end for _, end in group]
        distance, _ = edit_table(text, units.text[start:max(ends)], [0])
        candidates += [(distance[end - start], start, end) for end in ends]
    return min(candidates)[1:]


def edit_table(text: str, passage: str, starts: list[int]) -> tuple[list[int], list[int]]:
    """For every end (exclusive) in `passage`, the nearest span that ends there: edits from `text`, and start.

    Levenshtein's table, where a span may begin at any of `starts` at no cost (Sellers 1980, J. Algorithms 1):

        row_i[j] = min(row_i-1[j] + 1,  row_i[j-1] + 1,  row_i-1[j-1] + (text[i] != passage[j]))

    One integer, distance * scale + start, carries both, so that a minimum is the nearest, then the earliest.
    """
    codes, text_codes = (np.frombuffer(string.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
                         for string in (passage, text))  # [C], [T]
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
