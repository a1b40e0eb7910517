"""Which prefixes of a question share a forward pass: the search of search.py, many prefixes at a time. Skip on first reading.

`best_first` runs one prefix per pass. A pass costs nearly the same for many, so a `Search` alternates between two calls:

    choose   the prefixes to run next, the most promising first, and no more than the row of the cache has room for
    expand   what the model said about one of them: log P of each continuation, and of the end

A pass takes `WIDTH` prefixes of a question, a number that doubles after every second pass, up to `MOST_WIDTH`. It takes none
that is much less probable than the best one: that prefix may never be needed. A prefix that nobody has scored yet may take
part too, at a guess: half of its parent's probability, shared with its siblings. So several words are read in one pass, as with
the drafts of greedy decoding.

All this changes the order of the work only. Without `max_expansions` the answers are those of `best_first` (tested). There is
no model in this file. Used by: extract.py.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from qa.errors import not_finite
from qa.llama.candidates import ROOT, Trie
from qa.llama.encode import Prompt
from qa.llama.rivals import Rivals
from qa.llama.search import Extraction, Span

WIDTH = 5  # prefixes of a question in its first passes
MOST_WIDTH = 64
SLACK = math.log(16)  # a prefix whose log P is so far below that of the best one has to wait
GUESS = math.log(0.5)  # of a continuation that has not been scored


class Search:
    """The search for one question's best spans: which prefixes are open, and what has been found."""

    def __init__(self, prompt: Prompt, trie: Trie, num_best: int, max_expansions: float, refusal_log_prob: float | None = None,
                 rivals: Rivals | None = None, refuses: bool = False):
        self.prompt, self.trie, self.num_best, self.max_expansions = prompt, trie, num_best, max_expansions
        self.refusal_log_prob, self.rivals, self.refuses = refusal_log_prob, rivals, refuses
        self.open: list[tuple[float, int]] = []  # heap of (-log P, node): scored, not expanded
        self.best: list[tuple[float, int]] = []  # heap of (log P, -node): the best complete spans
        self.bounds = {ROOT: 0.0}  # log P of each node that is or is being expanded
        self.columns: dict[int, int] = {}  # the column of the cache that has a node's token
        self.fresh: set[int] = set()  # nodes being expanded
        self.num_expanded = self.num_passes = self.num_positions = 0

    @property
    def needed(self) -> float:
        """A prefix matters only if its log P is above this."""
        needed = self.best[0][0] if len(self.best) == self.num_best else -math.inf
        if self.rivals is None:
            return needed
        return max(needed, self.rivals.floor_of(self.refuses) + (self.refusal_log_prob or 0.0))

    @property
    def open_bound(self) -> float:
        bound = -self.open[0][0] if self.open else -math.inf
        return bound if bound > self.needed else -math.inf

    @property
    def is_done(self) -> bool:
        return self.open_bound == -math.inf or (self.num_expanded >= self.max_expansions and len(self.best) > 0)

    def choose(self, room: int, at_least_one: bool) -> list[int]:
        """The nodes to feed, at most `room`, parents first: the most promising, and ancestors that the cache forgot."""
        width = min(WIDTH << self.num_passes // 2, MOST_WIDTH, max(self.max_expansions - self.num_expanded, 1))
        floor = max(self.needed, self.open_bound - SLACK)
        guesses: list[tuple[float, int]] = []  # heap like `open`, of nodes whose parents are in this pass
        fed: dict[int, None] = {}
        self.fresh = set()
        while len(self.fresh) < width:
            source = min((heap for heap in (self.open, guesses) if heap), key=lambda heap: heap[0], default=[(math.inf, ROOT)])
            cost, node = source[0]
            if -cost <= floor:
                break
            missing = [step for step in self.trie.path(node) if step not in self.columns and step not in fed]
            if len(fed) + len(missing) > room and (fed or not at_least_one):
                break
            heapq.heappop(source)
            fed |= dict.fromkeys(missing)
            self.fresh.add(node)
            if source is self.open:
                self.bounds[node] = -cost
            for child in (children := self.trie.children(node)).values():
                heapq.heappush(guesses, (cost - GUESS + math.log(len(children)), child))
        return list(fed)

    def expand(self, node: int, log_probs: Sequence[float], end_log_prob: float) -> None:
        """What follows `node`: log P of each child's token, in order, and of the end."""
        if math.isnan(end_log_prob):
            raise not_finite(self.prompt.id)
        bound = self.bounds[node]
        self.num_expanded += node != ROOT
        if self.trie.span(node) is not None:
            log_prob = bound + min(end_log_prob, 0.0)
            heapq.heappush(self.best, (log_prob, -node))
            if self.rivals is not None:
                self.rivals.add(self.prompt.example_index, log_prob - (self.refusal_log_prob or 0.0), self.refuses)
            if len(self.best) > self.num_best:
                heapq.heappop(self.best)
        needed = self.needed
        for child, log_prob in zip(self.trie.children(node).values(), log_probs, strict=True):
            child_bound = bound + min(log_prob, 0.0)
            if child in self.fresh:
                self.bounds[child] = child_bound
            elif child_bound > needed:
                heapq.heappush(self.open, (-child_bound, child))

    def result(self) -> Extraction:
        piece, spans = self.prompt.piece, []
        for log_prob, negative in sorted(self.best, reverse=True):
            start, end = self.trie.span(-negative)
            spans.append(Span(piece.text[start:end], piece.start_char + start, piece.start_char + end, log_prob))
        return Extraction(self.prompt, spans, self.num_best, self.open_bound, self.num_expanded, self.num_passes,
                          self.num_positions, self.refusal_log_prob)
