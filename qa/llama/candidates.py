"""The candidates of exact decoding: which spans of a passage may be an answer, as a trie of their tokens.

A candidate begins where a small unit of the passage begins, ends where one ends (units.py: a run of letters, a run of digits,
any other character), and has at most `max_tokens` tokens. Its tokens are those of `PromptTemplate.answer_ids`, as in training:

    passage      The tower (1889) ...
    units        The | tower | ( | 1889 | )
    candidates   "The"  "The tower"  "The tower ("  ...  "1889"  "1889)"  ")"          15 of them

The trie has one node for each *prefix*, so the search (search.py) scores "The" once for all candidates that begin with it:

    root -- " The" [The] -- " tower" [The tower] -- " (" [The tower (] -- ...      [..]: a candidate ends here

It is kept as rows of tokens in alphabetic order, and nothing else. Rows that begin alike are neighbours, so a node is a first
row and a depth; its children are where the rows begin to differ. Only nodes that the search comes to are ever made.

Equal token sequences are one candidate. Of its places in the passage it takes, nearly as grounding.py does, the first
whose edges are edges of large units ("1889" in "1889ish, 1889": the second place), else the first found.

`make_trie` is the plain way: every string is encoded by itself. candidates_fast.py makes the same trie in a hundredth of the
time. Used by: search.py, schedule.py, extract.py, trace.py, candidates_fast.py, llama/reader.py.

Letters: R rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qa.data.squad import Example
from qa.llama.encode import Prompt
from qa.llama.prompt import PromptTemplate
from qa.llama.units import LARGE_UNITS, SMALL_UNITS, Units, cut
from qa.llama.wording import one_line

ROOT = 0
NO_END = -1


class Row(NamedTuple):
    """Candidates that begin at one unit, each beginning as the next one does."""

    tokens: list[int]  # of the longest
    first: int  # the unit
    lasts: list[int]  # of each token: the last unit (inclusive) of the candidate that it completes, or NO_END


class Trie:
    """The distinct candidates of one passage. A node's number is depth * R + its first row; a parent's number is smaller."""

    def __init__(self, rows: Iterable[Row], units: Units) -> None:
        self._rows, self._units = sorted(rows, key=lambda row: row.tokens), units
        self._num_rows = max(len(self._rows), 1)
        before = [[], *(row.tokens for row in self._rows)]
        self._shared = [_num_shared(*pair) for pair in zip(before, before[1:], strict=False)]  # [R] with the row before
        self._parents: dict[int, int] = {}  # of the nodes that `children` has returned
        self.children = functools.cache(self._children)
        self.span = functools.cache(self._span)

    def num_nodes(self) -> int:
        """The root is counted too."""
        return 1 + sum(len(row.tokens) for row in self._rows) - sum(self._shared)

    def path(self, node: int) -> list[int]:
        """The nodes from the root's child to `node`."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = self._parents[node]
        return nodes[::-1]

    def token(self, node: int) -> int:
        depth, row = divmod(node, self._num_rows)
        return self._rows[row].tokens[depth - 1]

    def prefix(self, node: int) -> list[int]:
        """The tokens from the root to the node."""
        depth, row = divmod(node, self._num_rows)
        return self._rows[row].tokens[:depth] if depth else []

    def _children(self, node: int) -> dict[int, int]:
        """token -> node, in the order of the tokens."""
        depth, found = node // self._num_rows, {}
        for row in self._rows_of(node):
            tokens = self._rows[row].tokens
            if len(tokens) > depth and tokens[depth] not in found:
                found[tokens[depth]] = child = (depth + 1) * self._num_rows + row
                self._parents[child] = node
        return found

    def _span(self, node: int) -> tuple[int, int] | None:
        """[start_char, end_char) of the candidate that ends here, or None."""
        depth, places = node // self._num_rows, []
        for row in self._rows_of(node) if depth else []:
            _, first, lasts = self._rows[row]
            if lasts[depth - 1] != NO_END:
                places.append((self._units.starts[first], self._units.ends[lasts[depth - 1]]))
        is_whole = cut(self._units.text, LARGE_UNITS).are_edges
        return min(places, key=lambda place: (not is_whole(*place), place), default=None)

    def _rows_of(self, node: int) -> range:
        """The rows that begin with the node's prefix."""
        depth, first = divmod(node, self._num_rows)
        later = range(first + 1, len(self._rows))
        return range(first, next((row for row in later if self._shared[row] < depth), len(self._rows)))


def _num_shared(tokens: Sequence[int], others: Sequence[int]) -> int:
    return next((place for place, pair in enumerate(zip(tokens, others, strict=False)) if pair[0] != pair[1]),
                min(len(tokens), len(others)))


def make_trie(template: PromptTemplate, text: str, max_tokens: int, stops: Sequence[int] | None = None) -> Trie:
    """All candidates of a passage with at most `max_tokens` tokens, the end token included; each is encoded by itself.

    stops[u], if given: no string from unit u with unit stops[u] in it is tried; it has too many tokens (candidates_fast.py).
    """
    units, rows = cut(text, SMALL_UNITS), []
    for first in range(len(units)):
        lasts = range(first, stops[first] if stops else len(units))
        encoded = template.encode_within_answer([answer_string(units, first, last) for last in lasts], begin=True)
        rows += [row_of_one(ids, first, last) for last, ids in zip(lasts, encoded, strict=True) if 0 < len(ids) < max_tokens]
    return Trie(rows, units)


def row_of_one(ids: list[int], first: int, last: int) -> Row:
    """One candidate, the units first..last (inclusive)."""
    return Row(ids, first, [NO_END] * (len(ids) - 1) + [last])


def answer_string(units: Units, first: int, last: int) -> str:
    """The units first..last (inclusive), as an answer is written."""
    return one_line(units.string(first, last))


def describe_reachability(template: PromptTemplate, examples: Sequence[Example], prompts: Sequence[Prompt],
                          max_tokens: int) -> list[str]:
    """The ceiling of exact decoding, as a line to print: how many answers are candidates. No line for data without answers."""
    texts: dict[int, list[str]] = {}
    for prompt in prompts:
        if examples[prompt.example_index].answers:
            texts.setdefault(prompt.example_index, []).append(prompt.piece.text)
    if not texts:
        return []

    @functools.cache
    def is_candidate(answer: str, text: str) -> bool:
        return bool(answer) and cut(text, SMALL_UNITS).find(answer) >= 0 and len(template.answer_ids(answer)) <= max_tokens

    found = [[any(is_candidate(answer.text.strip(), text) for text in pieces) for answer in examples[index].answers]
             for index, pieces in texts.items()]
    first, any_answer = 100 * sum(answers[0] for answers in found) / len(found), 100 * sum(map(any, found)) / len(found)
    return [f"ceiling of exact decoding: the first answer of {first:.2f}% of the questions that have one is a candidate, "
            f"any answer of {any_answer:.2f}%"]
