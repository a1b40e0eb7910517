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
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from qa.evaluation.metrics import normalize_answer
from qa.llama.edits import edit_table, edits_to_beginnings
from qa.llama.units import LARGE_UNITS, cut


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


class Words:
    """A passage's W words and its S solid units: what grounding needs of it, whatever the text."""

    def __init__(self, passage: str) -> None:
        self.units = units = cut(passage, LARGE_UNITS)
        self.solid = [unit for unit in range(len(units)) if units.string(unit, unit).strip(string.punctuation)]  # [S]
        self.word = [bisect.bisect(units.word_starts, unit) - 1 for unit in self.solid]  # [S]
        self.begins = [bisect.bisect_left(self.word, word) for word in range(len(units.word_starts) + 1)]  # [W + 1] in solid
        self.alone = [self.tokens_of(unit, unit) for unit in range(len(self.solid))]  # [S]
        self.tokens = [self.tokens_of(begin, stop - 1) if begin < stop else []
                       for begin, stop in itertools.pairwise(self.begins)]  # [W]
        self.num_before = [0, *itertools.accumulate(map(len, self.tokens))]  # [W + 1] tokens before a word
        self.always, self.ending = [], defaultdict(list)  # words where a best span may end: with any text; with a token in it
        for word, (begin, stop) in enumerate(itertools.pairwise(self.begins)):
            if stop == begin + 1 and self.tokens[word]:
                self.ending[self.tokens[word][-1]].append(word)
            elif begin < stop:
                self.always.append(word)  # several units, or an article

    def tokens_of(self, first: int, last: int) -> list[str]:
        """Of a part of a word: from solid unit `first` to `last`."""
        return _tokens(self.units.string(self.solid[first], self.solid[last]))

    def span(self, first: int, last: int) -> tuple[int, int]:
        """[start_char, end_char)."""
        return self.units.starts[self.solid[first]], self.units.ends[self.solid[last]]


_words = functools.lru_cache(maxsize=16)(Words)  # questions on one passage come one after another


def ground(text: str, passage: str) -> Grounded:
    """Find `text`, or the span nearest to it, in `passage`."""
    text, units = text.strip(), cut(passage, LARGE_UNITS)
    if not text or not units.starts:
        return Grounded("", None, None, "empty")
    start = units.find(text)  # "art" in "an art" rather than in "a part"
    start = start if start >= 0 else passage.find(text)
    kind, end = "exact", start + len(text)
    if start < 0:
        normalised, words = normalize_answer(text), _words(passage)
        spans = best_f1_spans(words, normalised.split())
        equal = [(start, end) for start, end in itertools.starmap(words.span, spans)
                 if normalize_answer(passage[start:end]) == normalised]
        if equal:
            kind, (start, end) = "normalised", min(equal, key=lambda span: (span[1] - span[0], span))
        else:
            kind, (start, end) = "repaired", _fewest_edits(text, words, spans)
    return Grounded(passage[start:end], start, end, kind)


def plain_best_f1_spans(words: Words, text_tokens: list[str]) -> list[tuple[int, int]]:
    """The spans (first, last) of solid units with the best F1, in order: all are scored. None if that F1 is 0."""
    f1s = {}
    for first, last in itertools.combinations_with_replacement(range(len(words.solid)), 2):
        start, end = words.span(first, last)
        tokens = normalize_answer(words.units.text[start:end]).split()
        num_common = (Counter(tokens) & Counter(text_tokens)).total()
        f1s[first, last] = 2 * num_common / max(len(tokens) + len(text_tokens), 1)
    best_f1 = max(f1s.values(), default=0.0)
    return [span for span, f1 in f1s.items() if 0 < f1 == best_f1]


def best_f1_spans(words: Words, text_tokens: list[str]) -> list[tuple[int, int]]:
    """The same; few spans are scored."""
    n, wanted, best_f1, best = len(text_tokens), Counter(text_tokens), 0.0, []
    limit, beginnings = n * n, {token[:size] for token in wanted for size in range(len(token) + 1)}
    ends = sorted(itertools.chain(words.always, *(words.ending.get(token, ()) for token in wanted)))
    for first, tokens in enumerate(words.alone):
        if _cannot_begin(tokens, wanted, beginnings):
            continue
        for last, num_common, num_tokens in _promising_spans(words, first, ends, wanted, beginnings, limit):
            f1 = 2 * num_common / (n + num_tokens)  # one fraction, rounded once: equal F1s are equal floats
            if f1 > best_f1:
                best_f1, best = f1, []
                limit = min(limit, int(2 * n / f1 - n + 1e-9))
            if f1 == best_f1:
                best.append((first, last))
    return best


def _cannot_begin(tokens: list[str], wanted: Counter, beginnings: set[str]) -> bool:
    """Whether no best span begins with a word, or a part of one, that has these tokens.

    Further characters let the first token grow, but for 2 characters ("x–th" + "e" ends in an article). `beginnings`: of the
    wanted tokens.
    """
    return bool(tokens) and tokens[0] not in wanted and (len(tokens) > 1 or tokens[0][:-2] not in beginnings)


def _promising_spans(words: Words, first: int, ends: list[int], wanted: Counter, beginnings: set[str],
                     limit: int) -> Iterator[tuple[int, int, int]]:
    """(last, c, m) of the spans of solid units that begin with `first`, end with `last`, and might be best.

    ends: the words in which one may end. What is between them is only counted.
    """
    left, num_common, num_tokens, word = dict(wanted), 0, 0, words.word[first]  # left: not found yet
    following = bisect.bisect(ends, word)
    while num_tokens <= limit:
        tokens: list[str] = []
        for last in range(first, words.begins[word + 1]):
            tokens = words.tokens_of(first, last)
            if num_tokens == 0 and _cannot_begin(tokens, wanted, beginnings):
                return
            if num_tokens + len(tokens) > limit + 1:
                return  # a longer part has as many tokens or more, unless one of them becomes an article
            if not tokens or tokens[-1] in wanted:
                more = left.get(tokens[0], 0) > 0 if len(tokens) == 1 else sum(
                    min(tokens.count(token), left.get(token, 0)) for token in set(tokens))
                if num_common + more > 0 and num_tokens + len(tokens) <= limit:
                    yield last, num_common + more, num_tokens + len(tokens)
        if num_tokens == 0 and tokens and tokens[0] not in wanted:
            return
        for token in tokens:
            if left.get(token, 0) > 0:
                left[token], num_common = left[token] - 1, num_common + 1
        num_tokens += len(tokens)
        if following == len(ends):
            return
        num_tokens += words.num_before[ends[following]] - words.num_before[word + 1]
        word, following = ends[following], following + 1
        first = words.begins[word]


def _fewest_edits(text: str, words: Words, spans: list[tuple[int, int]]) -> tuple[int, int]:
    """The span with the fewest edits from `text`; punctuation beside a span may be added. [start_char, end_char).

    Of equals the earliest, then the shortest. If there are no `spans`: of all spans of the passage.
    """
    units, edges = words.units, [-1, *words.solid, len(words.units)]  # solid unit i is edges[i + 1]
    if not spans:
        distance, starts = edit_table(text, units.text, units.starts)
        return min((distance[end], starts[end], end) for end in units.ends)[1:]
    best = (len(text) + len(units.text), 0, 0)  # edits, start, end
    for first, group in itertools.groupby(spans, key=lambda span: span[0]):
        starts = units.starts[edges[first] + 1 : edges[first + 1] + 1]
        ends = [end for _, last in group for end in units.ends[edges[last + 1] : edges[last + 2]]]
        for start in reversed(starts):
            if ends[0] - start - len(text) > best[0]:
                break  # so many characters more are as many edits
            distance = edits_to_beginnings(text, units.text[start : ends[-1]])
            best = min(best, min((distance[end - start], start, end) for end in ends))
    return best[1:]
