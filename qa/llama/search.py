"""The search for one question's best spans: branch and bound over the trie of candidates, without a model in it.

extract.py says what is searched and why it is exact. It alternates between two calls:

    choose   the prefixes that are to be fed next, the most promising first
    expand   what the model said behind one of them: log P of each continuation, and of the end

A node is a number of candidates.py's Trie. `best_spans` joins the pieces of a long passage.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from qa.errors import not_finite
from qa.llama.candidates import ROOT, Trie
from qa.llama.encode import Prompt, group_by_example

WIDTH = 5  # prefixes of a question in its first passes
MOST_WIDTH = 64
SLACK = math.log(16)  # a prefix so much less probable than the best one has to wait
GUESS = math.log(0.5)  # of a continuation that has not been scored


class Span(NamedTuple):
    text: str
    start_char: int
    end_char: int  # exclusive: context[start_char:end_char] == text
    log_prob: float


@dataclass(frozen=True)
class Work:
    """What a question's search cost, in all pieces of its passage, and how far it came."""

    num_expanded: int  # prefixes
    num_passes: int  # that it took part in
    num_positions: int  # tokens fed behind the cue
    gap: float | None  # None: proven. Else log P of the best candidate is at most so far above that of the best span found


@dataclass(eq=False)
class Extraction:
    """The most probable spans for one prompt (or, behind `best_spans`, one example)."""

    prompt: Prompt
    spans: list[Span]  # best first; fewer than `num_best` if there are no more
    num_best: int
    open_bound: float  # no candidate that is not in `spans` and was not looked at is more probable; -inf: none is left
    num_expanded: int
    num_passes: int  # that it took part in
    num_positions: int  # tokens fed behind the cue
    refusal_log_prob: float | None = None  # v2.0: log P(refusal, end | prompt)

    @property
    def is_proven(self) -> bool:
        return self.open_bound <= (self.spans[-1].log_prob if len(self.spans) == self.num_best else -math.inf)

    @property
    def work(self) -> Work:
        gap = None if self.is_proven else max(self.open_bound - self.spans[0].log_prob, 0.0)
        return Work(self.num_expanded, self.num_passes, self.num_positions, gap)


class Search:
    """The search for one question's best spans: which prefixes are open, and what has been found."""

    def __init__(self, prompt: Prompt, trie: Trie, num_best: int, max_expansions: int):
        self.prompt, self.trie, self.num_best, self.max_expansions = prompt, trie, num_best, max_expansions
        self.open: list[tuple[float, int]] = []  # heap of (-log P, node): scored, not expanded
        self.best: list[tuple[float, int]] = []  # heap of (log P, -node): the best complete spans
        self.bounds = {ROOT: 0.0}  # log P of each node that is or is being expanded
        self.columns: dict[int, int] = {}  # where in the cache a node's token stands
        self.fresh: set[int] = set()  # nodes being expanded
        self.num_expanded = self.num_passes = self.num_positions = 0

    @property
    def threshold(self) -> float:
        """What a prefix must exceed to matter."""
        return self.best[0][0] if len(self.best) == self.num_best else -math.inf

    @property
    def open_bound(self) -> float:
        bound = -self.open[0][0] if self.open else -math.inf
        return bound if bound > self.threshold else -math.inf

    @property
    def is_done(self) -> bool:
        is_over = 0 < self.max_expansions <= self.num_expanded and self.best
        return self.open_bound == -math.inf or bool(is_over)

    def choose(self, room: int, at_least_one: bool) -> list[int]:
        """The nodes to feed, at most `room`, parents first: the most promising, and ancestors that the cache forgot."""
        width = min(WIDTH << self.num_passes // 2, MOST_WIDTH)
        if self.max_expansions:
            width = min(width, max(self.max_expansions - self.num_expanded, 1))
        floor = max(self.threshold, self.open_bound - SLACK)
        guesses: list[tuple[float, int]] = []
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
            for child in (children := self.trie.children[node]).values():
                heapq.heappush(guesses, (cost - GUESS + math.log(len(children)), child))
        return list(fed)

    def expand(self, node: int, log_probs: Sequence[float], end_log_prob: float) -> None:
        """What follows `node`: log P of each child's token, in order, and of the end."""
        if math.isnan(end_log_prob):
            raise not_finite(self.prompt.id)
        bound = self.bounds[node]
        self.num_expanded += node != ROOT
        if self.trie.spans[node] is not None:
            heapq.heappush(self.best, (bound + min(end_log_prob, 0.0), -node))
            if len(self.best) > self.num_best:
                heapq.heappop(self.best)
        threshold = self.threshold
        for child, log_prob in zip(self.trie.children[node].values(), log_probs, strict=True):
            child_bound = bound + min(log_prob, 0.0)
            if child in self.fresh:
                self.bounds[child] = child_bound
            elif child_bound > threshold:
                heapq.heappush(self.open, (-child_bound, child))

    def result(self, text: str, refusal_log_prob: float | None) -> Extraction:
        offset, spans = self.prompt.piece.start_char, []
        for log_prob, negative in sorted(self.best, reverse=True):
            start, end = self.trie.spans[-negative]
            spans.append(Span(text[start:end], offset + start, offset + end, log_prob))
        return Extraction(self.prompt, spans, self.num_best, self.open_bound, self.num_expanded, self.num_passes,
                          self.num_positions, refusal_log_prob)


def best_spans(extractions: Sequence[Extraction]) -> list[Extraction]:
    """One per example, of passages read in pieces: the most probable spans of all pieces, each text once."""
    chosen = []
    for pieces, refusal in group_by_example(extractions):
        spans: dict[str, Span] = {}
        for span in sorted((span for piece in pieces for span in piece.spans), key=lambda span: (-span.log_prob, span[1:3])):
            spans.setdefault(span.text, span)
        counts = ("num_expanded", "num_passes", "num_positions")
        totals = {name: sum(getattr(piece, name) for piece in pieces) for name in counts}
        first = pieces[0]
        chosen.append(replace(first, spans=list(spans.values())[: first.num_best], refusal_log_prob=refusal,
                              open_bound=max(piece.open_bound for piece in pieces), **totals))
    return chosen


def describe_work(work: Sequence[Work]) -> list[str]:
    """Lines to print on the searches of all questions."""
    if not work:
        return []
    expanded = np.array([of_question.num_expanded for of_question in work])
    passes = np.mean([of_question.num_passes for of_question in work])
    positions = np.mean([of_question.num_positions for of_question in work])
    gaps = [of_question.gap for of_question in work if of_question.gap is not None]
    median, most = np.quantile(expanded, (0.5, 0.9), method="inverted_cdf")
    proof = f"{len(gaps)} of {len(work)} not proven, the largest gap in log P being {max(gaps):.2f}" if gaps else "all proven"
    return [f"exact search, per question: {passes:.1f} forward passes with {positions:.1f} tokens in all; prefixes expanded: "
            f"median {median}, 90% {most}, at most {expanded.max()}; {proof}"]
