"""The trie of candidates.py in a hundredth of the time. Skip on first reading.

A passage has some 6,000 candidates. Most tokenizers have no token that reaches over a space; then the words of a string (what
is between two spaces) can be encoded alone:

    tokens("The tower (1889") = tokens("The") + tokens(" tower") + tokens(" (1889")

So a few hundred words and parts of words are encoded, and the rest is concatenation. Whether this holds is checked in every
passage, for the longest string from every unit. Where it does not hold (a tokenizer with a token "of the"), `make_trie` encodes
each string by itself.

A text without spaces (Chinese, a link) is one word, of which there are too many parts. There `_stops` tells which parts have
too many tokens in any case.

Used by: extract.py, trace.py.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable

from qa.llama.candidates import ROOT, Trie, add_candidate, answer_string, make_trie
from qa.llama.prompt import PromptTemplate
from qa.llama.units import SMALL_UNITS, Units, cut

LONG_WORD = 64  # units; not all parts of a longer word are encoded

Part = tuple[int, list[int]]  # last unit (inclusive), tokens up to its end


def make_trie_fast(template: PromptTemplate, text: str, max_tokens: int) -> Trie:
    """The same as `make_trie`."""
    units = cut(text, SMALL_UNITS)
    trie, longest = _join_words(template, units, max_tokens - 1)
    strings = [answer_string(units, first, last) for first, (last, _) in enumerate(longest)]
    if template.encode_within_answer(strings, begin=True) == [ids for _, ids in longest]:
        return trie
    return make_trie(template, text, max_tokens, _stops(template, units, max_tokens - 1))


def _join_words(template: PromptTemplate, units: Units, max_tokens: int) -> tuple[Trie, list[Part]]:
    """The trie from words that are encoded alone; and the longest string from each unit that was looked at.

    That is one word longer than the first string with too many tokens: a token over a space might make them fewer.
    """
    stops = units.word_stops
    if any(stop - first > LONG_WORD for first, stop in enumerate(stops)):
        possible = _stops(template, units, max_tokens)
        stops = [max(min(pair), first + 1) for first, pair in enumerate(zip(stops, possible, strict=True))]
    beginnings = _encode_parts(template, units, range(len(units)), stops, begin=True)
    continuations = _encode_parts(template, units, units.word_starts[1:], stops, begin=False)
    trie, longest = Trie(), []
    for first in range(len(units)):
        node, tokens, parts = ROOT, [], beginnings[first]
        while True:
            was_too_long = len(tokens) > max_tokens
            for last, ids in parts:
                if len(tokens) + len(ids) <= max_tokens:
                    add_candidate(trie, node, ids, units, first, last)
            last, ids = parts[-1]
            tokens = tokens + ids
            if was_too_long or last + 1 == len(units) or last + 1 < units.word_stops[last]:
                break
            if len(tokens) <= max_tokens:
                node = trie.walk(node, ids)
            parts = continuations[last + 1]
        longest.append((last, tokens))
    return trie, longest


def _encode_parts(template: PromptTemplate, units: Units, firsts: Iterable[int], stops: list[int],
                  begin: bool) -> dict[int, list[Part]]:
    """For each of the units `firsts`: the strings from there up to a unit below stops[first], in order.

    begin: each text is the start of an answer. Else it is inside an answer, and is encoded with the space before it.
    """
    pairs = [(first, last) for first in firsts for last in range(first, stops[first])]
    texts = [("" if begin else _space_before(units, first)) + answer_string(units, first, last) for first, last in pairs]
    parts: dict[int, list[Part]] = {}
    for (first, last), ids in zip(pairs, template.encode_within_answer(texts, begin), strict=True):
        parts.setdefault(first, []).append((last, ids))
    return parts


def _space_before(units: Units, first: int) -> str:
    """What is before the first unit of a word; a newline in it is written as a space."""
    space = units.text[units.ends[first - 1] : units.starts[first]]
    return " " if "\n" in space else space


def _stops(template: PromptTemplate, units: Units, max_tokens: int) -> list[int]:
    """stops[u] for each unit u: no candidate that begins at u gets as far as unit stops[u], even with the longest tokens.

    A tokenizer writes text in letters of its own (" 塔" is "Ġå¡Ķ" in bytes, "▁<0xE5><0xA1><0x94>" to Llama 2), and a token is a
    string of these. So one token takes an encoding at most as far as the longest token that is found in the passage, so
    written, at this place or at an earlier one. Where the parts of a passage are written differently than the whole (a
    tokenizer that makes one <unk> of several units), nothing is known.
    """
    spaces = {first: _space_before(units, first) for first in units.word_starts[1:]}
    parts = [part for unit in range(len(units)) for part in (spaces.get(unit, ""), units.string(unit, unit))]
    written = dict(zip(set(parts), _own_letters(template, list(set(parts))), strict=True))
    edges = list(itertools.accumulate(len(written[part]) for part in parts))  # [2U] a unit begins at an even, ends at an odd
    whole = "".join(written[part] for part in parts)
    if _own_letters(template, ["".join(parts)]) != [whole]:
        return [len(units)] * len(units)
    before = {text[i:] for text in _own_letters(template, [" ", *set(spaces.values())]) for i in range(len(text) + 1)}
    vocabulary = template.tokenizer.get_vocab()
    most = max(map(len, vocabulary))

    def longest(start: int, space: str = "") -> int:
        """Where the longest token ends that is found at `start`, with `space` written before it."""
        ends = range(min(start + most, len(whole)), start, -1)
        return next((end for end in ends if space + whole[start:end] in vocabulary), start)

    furthest = list(itertools.accumulate(map(longest, range(len(whole) + 1)), max))
    stops = []
    for start in edges[::2]:
        end = max(longest(start, space) for space in before)
        for _ in range(max_tokens - 1):
            end = furthest[end]
        stops.append(bisect.bisect_right(edges[1::2], end))
    return stops


def _own_letters(template: PromptTemplate, texts: list[str]) -> list[str]:
    encoded = template.encode_within_answer(texts, begin=False)
    return ["".join(template.tokenizer.convert_ids_to_tokens(ids)) for ids in encoded]
