"""The candidates of exact decoding: which spans of a passage may be an answer, as a trie of their tokens.

A candidate begins where a small unit of the passage begins, ends where one ends (units.py: a run of letters, a run of digits,
any other character), and has at most `max_tokens` tokens. Its tokens are those of `PromptTemplate.answer_ids`, as in training:

    passage      The tower (1889) ...
    units        The | tower | ( | 1889 | )
    candidates   "The"  "The tower"  "The tower ("  ...  "1889"  "1889)"  ")"          15 of them

The trie has one node for each *prefix*, so the search (search.py) scores "The" once for all candidates that begin with it:

    root -- " The" [The] -- " tower" [The tower] -- " (" [The tower (] -- ...      [..]: a candidate ends here

Equal token sequences are one candidate. Of its places in the passage it takes, nearly as grounding.py does, the first
whose edges are edges of large units ("1889" in "1889ish, 1889": the second place), else the first found.

`make_trie` is the plain way: every string is encoded by itself. candidates_fast.py makes the same trie in a hundredth of the
time. Used by: search.py, schedule.py, extract.py, candidates_fast.py, llama/reader.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from qa.data.squad import Example
from qa.llama.encode import Prompt
from qa.llama.prompt import PromptTemplate
from qa.llama.units import LARGE_UNITS, SMALL_UNITS, Units, cut
from qa.llama.wording import one_line

ROOT = 0


class Trie:
    """The distinct candidates of one passage. A node is a number; the number of its parent is smaller."""

    def __init__(self) -> None:
        self.tokens = [-1]  # of each node
        self.parents = [-1]
        self.children: list[dict[int, int]] = [{}]  # token -> node
        self.spans: list[tuple[int, int] | None] = [None]  # [start_char, end_char) of the candidate that ends here
        self._is_whole = [False]

    def walk(self, node: int, token_ids: Sequence[int]) -> int:
        """Go from `node` along these tokens; make the nodes that are missing."""
        children = self.children
        for token in token_ids:
            child = children[node].get(token)
            if child is None:
                child = children[node][token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
                children.append({})
                self.spans.append(None)
                self._is_whole.append(False)
            node = child
        return node

    def end(self, node: int, start_char: int, end_char: int, is_whole: bool) -> None:
        """A candidate ends at `node`. Of two places the one with `is_whole` is kept, else the one that came first."""
        if self.spans[node] is None or (is_whole and not self._is_whole[node]):
            self.spans[node], self._is_whole[node] = (start_char, end_char), is_whole

    def path(self, node: int) -> list[int]:
        """The nodes from the root's child to `node`."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def prefix(self, node: int) -> list[int]:
        """The tokens on this path."""
        return [self.tokens[step] for step in self.path(node)]


def make_trie(template: PromptTemplate, text: str, max_tokens: int, stops: Sequence[int] | None = None) -> Trie:
    """All candidates of a passage with at most `max_tokens` tokens, the end token included; each is encoded by itself.

    stops[u], if given: no string from unit u with unit stops[u] in it is tried; it has too many tokens (candidates_fast.py).
    """
    trie, units = Trie(), cut(text, SMALL_UNITS)
    for first in range(len(units)):
        lasts = range(first, stops[first] if stops else len(units))
        encoded = template.encode_within_answer([answer_string(units, first, last) for last in lasts], begin=True)
        for last, ids in zip(lasts, encoded, strict=True):
            if len(ids) < max_tokens:
                add_candidate(trie, ROOT, ids, units, first, last)
    return trie


def answer_string(units: Units, first: int, last: int) -> str:
    """The units first..last (inclusive), as an answer is written."""
    return one_line(units.string(first, last))


def add_candidate(trie: Trie, node: int, ids: list[int], units: Units, first: int, last: int) -> None:
    """Add the units first..last (inclusive). The candidate's tokens are those of `node`'s prefix, then `ids`."""
    start_char, end_char = units.starts[first], units.ends[last]
    is_whole = cut(units.text, LARGE_UNITS).are_edges(start_char, end_char)
    trie.end(trie.walk(node, ids), start_char, end_char, is_whole)


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
