"""The trie of candidates.py in a hundredth of the time. Skip on first reading.

A passage has some 6,000 candidates. Most tokenizers have no token that reaches over a space; then the words of a string (what
is between two spaces) can be encoded alone:

    tokens("The tower (1889") = tokens("The") + tokens(" tower") + tokens(" (1889")

So a few hundred words and parts of words are encoded. The tokens of all words, one after another, are a chain. The row of a
unit is the rest of its own word, then the chain from the next word on:

    chain    " tower" " (" "1889" ")" " is"      row of "The"     " The" | " tower" " (" "1889" ")" " is"
                                                 row of "1889"    " 1889" ")" | " is"

Where a part of a word is no beginning of the word's tokens (`tall."` is " tall" and `."`, but `tall.` is " tall" and "."), it
makes rows of its own. Whether words may be encoded alone is checked in every passage. Where they may not (a tokenizer with a
token "of the"), `make_trie` encodes each string by itself.

A text without spaces (Chinese, a link) is one word, of which there are too many parts. There `_stops` tells which parts have
too many tokens in any case.

Used by: extract.py, trace.py.

Letters: U units, C tokens of the chain.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qa.llama.candidates import NO_END, Row, Trie, answer_string, make_trie, row_of_one
from qa.llama.prompt import PromptTemplate
from qa.llama.units import SMALL_UNITS, Units, cut

LONG_WORD = 64  # units; not all parts of a longer word are encoded

NO_TOKEN = -1
OVER_SPACE = re.compile(r"[^\sĠ▁Ċĉč][ Ġ▁]")  # in a token as the tokenizer writes it: a space after another character
RARE_SPACE = re.compile(r"[^\S \n]")  # a tab or another one, not looked for above


class Word(NamedTuple):
    """A word, or the rest of one, encoded."""

    tokens: list[int]
    lasts: list[int]  # of each token: as in Row
    others: list[tuple[int, list[int]]]  # last unit and tokens of the parts that are no beginning of `tokens`
    last: int  # the last unit that was encoded
    is_complete: bool  # else the rest of the word was not: it has too many tokens


class Chain(NamedTuple):
    """All words but the first, one after another, each as inside an answer."""

    tokens: list[int]  # [C]
    lasts: list[int]  # [C]
    places: dict[int, int]  # of each word's first unit: where the word begins
    others: list[tuple[int, int, list[int]]]  # of all words: where the word begins, last unit, tokens


def make_trie_fast(template: PromptTemplate, text: str, max_tokens: int) -> Trie:
    """The same as `make_trie`."""
    units, most = cut(text, SMALL_UNITS), max_tokens - 1
    stops = units.word_stops
    if any(stop - first > LONG_WORD for first, stop in enumerate(stops)):
        possible = _stops(template, units, most)
        stops = [max(min(pair), first + 1) for first, pair in enumerate(zip(stops, possible, strict=True))]
    beginnings = _encode_words(template, units, range(len(units)), stops, begin=True)
    continuations = _encode_words(template, units, units.word_starts[1:], stops, begin=False)
    if not _words_agree_with_whole_strings(template, units, most, beginnings, continuations):
        return make_trie(template, text, max_tokens, _stops(template, units, most))
    chain, rows = _make_chain(continuations, most), []
    for first, word in beginnings.items():
        place = chain.places.get(word.last + 1, len(chain.tokens)) if word.is_complete else len(chain.tokens)
        rows += _make_rows(first, word, chain, place, most)
    return Trie(rows, units)


def _encode_words(template: PromptTemplate, units: Units, firsts: Iterable[int], stops: list[int],
                  begin: bool) -> dict[int, Word]:
    """The words from each of the units `firsts` to the end of its word, or up to a unit below stops[first], with all parts.

    begin: each is the start of an answer. Else it is inside an answer, and is encoded with the space before it.
    """
    pairs = [(first, last) for first in firsts for last in range(first, stops[first])]
    texts = [("" if begin else _space_before(units, first)) + answer_string(units, first, last) for first, last in pairs]
    different = list(dict.fromkeys(texts))  # a passage has many a word several times
    encoded = dict(zip(different, template.encode_within_answer(different, begin), strict=True))
    return {first: _make_word([(last, encoded[text]) for (_, last), text in group], units)
            for first, group in itertools.groupby(zip(pairs, texts, strict=True), key=lambda pair: pair[0][0])}


def _make_word(parts: list[tuple[int, list[int]]], units: Units) -> Word:
    last, tokens = parts[-1]
    word = Word(tokens, [NO_END] * len(tokens), [], last, last + 1 == units.word_stops[last])
    for last, ids in parts:
        if ids != tokens[:len(ids)]:
            word.others.append((last, ids))
        elif ids and word.lasts[len(ids) - 1] == NO_END:  # two parts may be the same to the tokenizer: the shorter one
            word.lasts[len(ids) - 1] = last
    return word


def _make_chain(continuations: dict[int, Word], most: int) -> Chain:
    chain = Chain([], [], {}, [])
    for first, word in continuations.items():
        place = chain.places[first] = len(chain.tokens)
        chain.others.extend((place, *part) for part in word.others)
        gap = 0 if word.is_complete else most  # no candidate reaches over it
        chain.tokens.extend(word.tokens + [NO_TOKEN] * gap)
        chain.lasts.extend(word.lasts + [NO_END] * gap)
    return chain


def _make_rows(first: int, word: Word, chain: Chain, place: int, most: int) -> Iterator[Row]:
    """The candidates from unit `first` on, of at most `most` tokens. word: the rest of its word; the next is at `place`."""
    room = most - len(word.tokens)
    end = place + max(room, 0)
    tokens, lasts = word.tokens + chain.tokens[place:end], word.lasts + chain.lasts[place:end]
    length = next((number for number in range(min(len(lasts), most), 0, -1) if lasts[number - 1] != NO_END), 0)
    if length:
        yield Row(tokens[:length], first, lasts[:length])
    yield from (row_of_one(ids, first, last) for last, ids in word.others if len(ids) <= most)
    for before, last, ids in chain.others[bisect.bisect_left(chain.others, (place,)) :]:
        if before >= end:
            break
        if before - place + len(ids) <= room:
            yield row_of_one(word.tokens + chain.tokens[place:before] + ids, first, last)


def _words_agree_with_whole_strings(template: PromptTemplate, units: Units, most: int, beginnings: dict[int, Word],
                                    continuations: dict[int, Word]) -> bool:
    """Whether the tokens of words, joined, are those of the whole string; for the longest string from every unit.

    That is one word longer than the first string with too many tokens: a token over a space might make them fewer. Where the
    tokenizer has no token over a space, strings that cover the passage are enough.
    """
    covers = not (_has_token_over_space(template) or RARE_SPACE.search(units.text))
    strings, joined, covered = [], [], 0
    for first, word in beginnings.items():
        if covers and first < covered:
            continue
        tokens, was_too_long = word.tokens, False
        while not was_too_long and word.is_complete and word.last + 1 < len(units):
            was_too_long = len(tokens) > most
            word = continuations[word.last + 1]
            tokens = tokens + word.tokens
        strings.append(answer_string(units, first, word.last))
        joined.append(tokens)
        covered = word.last + 1
    return template.encode_within_answer(strings, begin=True) == joined


@functools.lru_cache(maxsize=16)
def _has_token_over_space(template: PromptTemplate) -> bool:
    return any(map(OVER_SPACE.search, template.tokenizer.get_vocab()))


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
