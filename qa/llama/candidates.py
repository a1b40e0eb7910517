"""The candidates of exact decoding: which spans of a passage may be an answer, as a trie of their tokens.

A passage is cut into *units* (units.py): runs of letters, runs of digits, single other characters, and single letters of
scripts that are written without blanks. This is the same for every tokenizer. A candidate is a string from a unit's
beginning to a unit's end, whose encoding as an answer (`PromptTemplate.answer_ids`, that of training: after the cue, in one
line) has at most so many tokens:

    passage      The tower (1889) ...
    units        The | tower | ( | 1889 | )
    candidates   "The"  "The tower"  "The tower ("  ...  "1889"  "1889)"  ")"          15 of them

Equal token sequences are one candidate, at the place that grounding.py would choose: the first that cuts no word, else
the first. The trie shares beginnings, so the search (extract.py) scores "The" once for all candidates that go on from it:

    root -- " The" [The] -- " tower" [The tower] -- " (" [The tower (] -- ...      [..]: a candidate ends here

Encoding each of some 6,000 strings of a passage is slow. A tokenizer whose tokens never reach over a blank encodes what
stands between two blanks, a *chunk*, alone:

    tokens(chunk_1 blank chunk_2 ...) = tokens(chunk_1) + tokens(blank chunk_2) + ...

so a few hundred chunks and parts of chunks are encoded, and the rest is concatenation. That this holds is checked in
every passage, for the longest string of every beginning; where it does not (a tokenizer with tokens such as "of the"),
each string is encoded by itself.

Input: a passage's text. Used by: extract.py; `describe_reachability` by llama/reader.py.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Sequence

from qa.data.squad import Example
from qa.llama.encode import Prompt
from qa.llama.prompt import PromptTemplate
from qa.llama.units import PARTS, WORDS, Units, cut
from qa.llama.wording import one_line

ROOT = 0
LONG_CHUNK = 64  # units: of a longer one not all strings are encoded


class Trie:
    """The distinct candidates of one passage. A node is a number; its parent's is smaller."""

    def __init__(self) -> None:
        self.tokens = [-1]  # of each node
        self.parents = [-1]
        self.children: list[dict[int, int]] = [{}]  # token -> node
        self.spans: list[tuple[int, int] | None] = [None]  # [start_char, end_char) of the candidate that ends here
        self._cuts_word = [False]

    def add(self, node: int, token_ids: Sequence[int]) -> int:
        """Walk on from `node`, where need be on new nodes."""
        children = self.children
        for token in token_ids:
            child = children[node].get(token)
            if child is None:
                child = children[node][token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
                children.append({})
                self.spans.append(None)
                self._cuts_word.append(True)
            node = child
        return node

    def end(self, node: int, start_char: int, end_char: int, cuts_word: bool) -> None:
        """A candidate ends at `node`; of several places the better is kept, else the one that came first."""
        if self.spans[node] is None or (self._cuts_word[node] and not cuts_word):
            self.spans[node], self._cuts_word[node] = (start_char, end_char), cuts_word

    def find(self, token_ids: Sequence[int]) -> int | None:
        """The node of these tokens; None: no candidate begins so."""
        node: int | None = ROOT
        for token in token_ids:
            node = None if node is None else self.children[node].get(token)
        return node

    def path(self, node: int) -> list[int]:
        """The nodes from the root's child to `node`."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]


def _size(chunk: tuple[int, int]) -> int:
    return chunk[1] - chunk[0]


def _string(units: Units, first: int, last: int) -> str:
    """The units first..last (inclusive), as an answer is written."""
    return one_line(units.string(first, last))


def _blank(units: Units, first: int) -> str:
    """What stands before the first unit of a chunk; a newline in it is written as a blank."""
    blank = units.text[units.ends[first - 1] : units.starts[first]]
    return " " if "\n" in blank else blank


def _end(trie: Trie, node: int, units: Units, first: int, last: int) -> None:
    start_char, end_char = units.starts[first], units.ends[last]
    trie.end(node, start_char, end_char, cuts_word=not cut(units.text, WORDS).bound(start_char, end_char))


def make_trie(template: PromptTemplate, text: str, max_tokens: int) -> Trie:
    """All candidates of a passage.

    Args:
        max_tokens: of a candidate at most, its end token included, as --max-answer-length counts them.
    """
    units = cut(text, PARTS)
    trie, longest = _by_chunks(template, units, max_tokens - 1)
    alone = template.encode_within_answer([_string(units, first, last) for first, (last, _) in enumerate(longest)], begin=True)
    if alone == [ids for _, ids in longest]:
        return trie
    return _one_by_one(template, units, max_tokens - 1)


def _by_chunks(template: PromptTemplate, units: Units, max_tokens: int) -> tuple[Trie, list[tuple[int, list[int]]]]:
    """The trie, chunks being encoded alone; and for each first unit the longest string looked at: last unit and tokens.

    That is one chunk longer than the first with too many tokens: a token that reaches over a blank may make them fewer.
    """
    trie, longest = Trie(), []
    heads, tails = _encode_chunks(template, units, max_tokens)
    for number, (chunk_first, chunk_stop) in enumerate(units.chunks):
        for first in range(chunk_first, chunk_stop):
            base, tokens, endings = ROOT, [], heads[first]
            for next_number in range(number + 1, len(units.chunks) + 1):
                is_enough = len(tokens) > max_tokens
                for last, ids in endings:
                    if len(tokens) + len(ids) <= max_tokens:
                        _end(trie, trie.add(base, ids), units, first, last)
                last, ids = endings[-1]
                tokens = tokens + ids
                is_whole = last + 1 == units.chunks[next_number - 1][1]
                if next_number == len(units.chunks) or is_enough or not is_whole:
                    break
                base, endings = trie.add(base, ids) if len(tokens) <= max_tokens else base, tails[next_number]
            longest.append((last, tokens))
    return trie, longest


Endings = list[tuple[int, list[int]]]  # (last unit, tokens up to its end), in order


def _encode_chunks(template: PromptTemplate, units: Units, max_tokens: int) -> tuple[list[Endings], list[Endings]]:
    """What may begin a candidate, from each unit within its chunk; what may go on in one, from each chunk's first unit.

    Both stop where a string is too long for its tokens, and behind the first ending in any case.
    """
    stops = _stops(template, units, max_tokens) if max(map(_size, units.chunks), default=0) > LONG_CHUNK else units.chunk_stop

    def lasts(first: int, stop: int) -> range:
        return range(first, max(min(stops[first], stop), first + 1))

    begins = [(first, last) for chunk_first, stop in units.chunks
              for first in range(chunk_first, stop) for last in lasts(first, stop)]
    goes_on = [(number, last) for number, (first, stop) in enumerate(units.chunks) if number for last in lasts(first, stop)]
    heads: list[Endings] = [[] for _ in units.starts]
    encoded = template.encode_within_answer([_string(units, first, last) for first, last in begins], begin=True)
    for (first, last), ids in zip(begins, encoded, strict=True):
        heads[first].append((last, ids))
    tails: list[Endings] = [[] for _ in units.chunks]
    texts = [_blank(units, units.chunks[number][0]) + _string(units, units.chunks[number][0], last) for number, last in goes_on]
    for (number, last), ids in zip(goes_on, template.encode_within_answer(texts, begin=False), strict=True):
        tails[number].append((last, ids))
    return heads, tails


def _one_by_one(template: PromptTemplate, units: Units, max_tokens: int) -> Trie:
    """The same for any tokenizer, at some hundred times the cost."""
    trie = Trie()
    for first, stop in enumerate(_stops(template, units, max_tokens)):
        lasts = range(first, stop)
        encoded = template.encode_within_answer([_string(units, first, last) for last in lasts], begin=True)
        for last, ids in zip(lasts, encoded, strict=True):
            if len(ids) <= max_tokens:
                _end(trie, trie.add(ROOT, ids), units, first, last)
    return trie


def _stops(template: PromptTemplate, units: Units, max_tokens: int) -> list[int]:
    """For each unit, one that no candidate from there on reaches: `max_tokens` of the longest tokens end before it.

    A tokenizer writes text in letters of its own (" 塔" is "Ġå¡Ķ" in bytes, "▁<0xE5><0xA1><0x94>" to Llama 2), and a
    token is a string of these. From any place of the passage so written, an encoding gets no further with a token than
    to where the longest token ends that stands there, or at a place before. Where the parts of a passage are not
    written as in the whole (a tokenizer that makes one <unk> of several units), nothing is known.
    """
    blanks = {first: _blank(units, first) for first, _ in units.chunks[1:]}
    parts = [part for unit in range(len(units.starts)) for part in (blanks.get(unit, ""), units.string(unit, unit))]
    written = dict(zip(set(parts), _own_letters(template, list(set(parts))), strict=True))
    edges = list(itertools.accumulate(len(written[part]) for part in parts))  # [2U] a unit begins at an even, ends at an odd
    whole = "".join(written[part] for part in parts)
    if _own_letters(template, ["".join(parts)]) != [whole]:
        return [len(units.starts)] * len(units.starts)
    before = {text[i:] for text in _own_letters(template, [" ", *set(blanks.values())]) for i in range(len(text) + 1)}
    vocabulary, most = _vocabulary(template.tokenizer)

    def longest(start: int, blank: str = "") -> int:
        """Where the longest token ends that stands at `start`, with `blank` written before it."""
        ends = range(min(start + most, len(whole)), start, -1)
        return next((end for end in ends if blank + whole[start:end] in vocabulary), start)

    furthest = list(itertools.accumulate(map(longest, range(len(whole) + 1)), max))
    stops = []
    for start in edges[::2]:
        end = max(longest(start, blank) for blank in before)
        for _ in range(max_tokens - 1):
            end = furthest[end]
        stops.append(bisect.bisect_right(edges[1::2], end))
    return stops


def _own_letters(template: PromptTemplate, texts: list[str]) -> list[str]:
    encoded = template.encode_within_answer(texts, begin=False)
    return ["".join(template.tokenizer.convert_ids_to_tokens(ids)) for ids in encoded]


@functools.lru_cache(maxsize=2)
def _vocabulary(tokenizer) -> tuple[frozenset[str], int]:
    """All tokens, and the length of the longest."""
    tokens = frozenset(tokenizer.get_vocab())
    return tokens, max(map(len, tokens))


def reachability(template: PromptTemplate, examples: Sequence[Example], prompts: Sequence[Prompt],
                 max_tokens: int) -> tuple[float, float]:
    """The ceiling of exact decoding: the share of questions whose first answer, and any answer, is a candidate.

    Args:
        prompts: those of the examples, whose pieces of passages are searched.
        max_tokens: as for `make_trie`.
    """
    texts: dict[int, list[str]] = {}
    for prompt in prompts:
        texts.setdefault(prompt.example_index, []).append(prompt.piece.text)
    answered = [index for index in texts if examples[index].answers]

    @functools.cache
    def is_candidate(answer: str, text: str) -> bool:
        return bool(answer) and cut(text, PARTS).find(answer) >= 0 and len(template.answer_ids(answer)) <= max_tokens

    first = any_of_them = 0
    for index in answered:
        found = [any(is_candidate(answer.text.strip(), text) for text in texts[index]) for answer in examples[index].answers]
        first += found[0]
        any_of_them += any(found)
    return first / max(len(answered), 1), any_of_them / max(len(answered), 1)


def describe_reachability(template: PromptTemplate, examples: Sequence[Example], prompts: Sequence[Prompt],
                          max_tokens: int) -> list[str]:
    """A line to print; none for data without answers."""
    if not any(example.answers for example in examples):
        return []
    first, any_of_them = reachability(template, examples, prompts, max_tokens)
    return [f"ceiling of exact decoding: the first answer of {100 * first:.2f}% of the questions that have one is a candidate, "
            f"any answer of {100 * any_of_them:.2f}%"]
