"""Exact decoding: the most probable span of the passage, with a proof.

Greedy text need not be in the passage; and where it is, it need not be the most probable span. Here the answer is

    argmax  log P(s) = sum_i log P(t_i | prompt, t_1 .. t_{i-1}) + log P(end | prompt, t_1 .. t_n),   t_1 .. t_n = tokens(s)

over the candidates s of candidates.py ("exact-extract", Castel et al. 2021, arXiv:2108.05857). t_1 .. t_n is the one encoding
that training would use. The same string has other tokenisations; we do not count their probability. P(end) is the sum over
all end tokens (end_tokens.py).

Castel et al. run one row of `max_answer_length` tokens for every start in the passage. `best_first` runs one prefix at a time,
the most probable one first (branch and bound, Land & Doig 1960). No log-probability is positive, so a prefix is a bound on all
that begins with it:

    log P(t_1 .. t_k) >= log P(t_1 .. t_k, ..., end)

Once the best answer found is at least as probable as every prefix that is still open, no other candidate can be better: this is
the proof. Most prefixes are never run. An example, the passage "The tower 1889", where a prefix's numbers are P(prefix) and
P(prefix as the whole answer):

    run "The"        0.50  0.05     open: "The tower" 0.40, "1889" 0.40, "tower" 0.10
    run "The tower"  0.40  0.36     open: "1889" 0.40, "tower" 0.10, "The tower 1889" 0.04
    run "1889"       0.40  0.20     open: "tower" 0.10, "The tower 1889" 0.04; both are below 0.36, so "The tower" is the best

For one question read this file, candidates.py with units.py, and trace.py, which calls `best_first` with the real model
(evaluate.py --trace); the prompt is prompt.py's. Skip on first reading: extract.py, schedule.py, candidates_fast.py, reading.py
and cache.py, which answer many questions at a time. Used by: extract.py, schedule.py, trace.py, llama/reader.py.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from qa.llama.candidates import ROOT, Trie
from qa.llama.encode import Prompt, group_by_example

COUNTS = ("num_expanded", "num_passes", "num_positions")  # of an Extraction


class Step(NamedTuple):
    """A prefix that was run through the model."""

    node: int
    log_prob: float
    answer_log_prob: float | None  # as the whole answer, with its end; None: it is no candidate


def best_first(trie: Trie, log_probs: Callable[[list[int]], tuple[Any, float]],
               num_best: int = 1) -> tuple[list[Step], list[Step], list[tuple[float, int]]]:
    """The `num_best` most probable candidates, by the plain search.

    Args:
        log_probs: the model, as a function. It takes the tokens of a prefix, and returns log P of each next token (a list or
            a dict, indexed by the token), and log P of the end.

    Returns:
        The best candidates, best first; all prefixes that were run, in order; (log P, node) of those left open, best first.
    """
    open_prefixes = [(0.0, ROOT)]  # heap of (-log P, node)
    best: list[Step] = []
    steps: list[Step] = []
    while open_prefixes and (len(best) < num_best or -open_prefixes[0][0] > best[-1].answer_log_prob):
        cost, node = heapq.heappop(open_prefixes)
        next_log_probs, end_log_prob = log_probs(trie.prefix(node))
        for token, child in trie.children(node).items():
            heapq.heappush(open_prefixes, (cost - min(next_log_probs[token], 0.0), child))  # rounding gives 1e-8 at times
        steps.append(Step(node, -cost, min(end_log_prob, 0.0) - cost if trie.span(node) else None))
        if trie.span(node):
            best = sorted([*best, steps[-1]], key=lambda step: -step.answer_log_prob)[:num_best]
    return best, steps, [(-cost, node) for cost, node in sorted(open_prefixes)]


class Span(NamedTuple):
    text: str
    start_char: int
    end_char: int  # exclusive: passage[start_char:end_char] == text
    log_prob: float


@dataclass(eq=False)
class Extraction:
    """The most probable spans for one prompt (or, after `join_pieces`, one example), and what the search for them cost."""

    prompt: Prompt
    spans: list[Span]  # best first; fewer than `num_best` if there are no more
    num_best: int
    open_bound: float  # upper bound on log P of candidates not looked at; -inf once it is too low to beat `spans`
    num_expanded: int  # prefixes that were run
    num_passes: int  # forward passes that the search took part in
    num_positions: int  # tokens fed after the cue
    refusal_log_prob: float | None = None  # v2.0: log P(refusal, end | prompt)

    @property
    def gap(self) -> float | None:
        """None: proven. Else: the most by which another candidate's log P may exceed that of the best span."""
        is_proven = self.open_bound <= (self.spans[-1].log_prob if len(self.spans) == self.num_best else -math.inf)
        return None if is_proven else max(self.open_bound - self.spans[0].log_prob, 0.0)


def join_pieces(extractions: Sequence[Extraction]) -> list[Extraction]:
    """One per example. Of a passage in pieces: the most probable spans of all pieces, each text once."""
    joined = []
    for found, refusal in group_by_example(extractions):
        spans: dict[str, Span] = {}
        for span in sorted((span for one in found for span in one.spans), key=lambda span: (-span.log_prob, span[1:3])):
            spans.setdefault(span.text, span)
        joined.append(replace(found[0], spans=list(spans.values())[: found[0].num_best], refusal_log_prob=refusal,
                              open_bound=max(one.open_bound for one in found),
                              **{name: sum(getattr(one, name) for one in found) for name in COUNTS}))
    return joined


def describe_work(found: Sequence[Extraction]) -> str:
    """A line to print on the searches of all questions."""
    expanded, passes, positions = np.array([[getattr(one, name) for name in COUNTS] for one in found]).T
    gaps = [one.gap for one in found if one.gap is not None]
    median, most = np.quantile(expanded, (0.5, 0.9), method="inverted_cdf")
    proof = f"{len(gaps)} of {len(found)} not proven, the largest gap in log P being {max(gaps):.2f}" if gaps else "all proven"
    return (f"exact search, per question: {passes.mean():.1f} forward passes with {positions.mean():.1f} tokens in all; "
            f"prefixes expanded: median {median}, 90% {most}, at most {expanded.max()}; {proof}")
