"""Exact decoding: the most probable span of the passage, proven.

Greedy text need not stand in the passage, nor be the model's best answer if it does. Here the answer is

    argmax  log P(s) = sum_i log P(t_i | prompt, t_1 .. t_{i-1}) + log P(end | prompt, t_1 .. t_n),   t_1 .. t_n = tokens(s)

over the candidates s of candidates.py ("exact-extract", Castel et al. 2021, arXiv:2108.05857). t_1 .. t_n is the one
encoding that training would use; other ways to write the same string are not added to its probability. P(end) is the sum
over all end tokens, as in greedy decoding.

Castel et al. run one row of `max_answer_length` tokens for every start in the passage. Here the search is best first
(branch and bound, Land & Doig 1960). No log-probability is positive, so a prefix is a bound on all that goes on from it:

    log P(t_1 .. t_k) >= log P(t_1 .. t_k, ..., end)

To *expand* a prefix is to feed its last token: the model then says how probable its end is (a span is complete) and each
of its continuations in the trie. When the n-th best complete span is at least as probable as every prefix that is still
open, the n best are found; most prefixes are never looked at. The root needs no pass: the cue predicts all first tokens.

A pass serves all questions of a batch, each with its `WIDTH` most promising prefixes, twice as many in every other pass of
a long search, and none that is much less probable than the best: it may never be needed. A prefix that nobody has scored
yet takes part at a guess: half of its parent's probability, shared with the parent's other continuations. So a passage's
words are read several at a time, as greedy decoding does with its drafts. All this decides on the order of the work; where
no budget ends the search, the result is the same.

The passage is read once, and each prefix is fed once: tokens stay in the cache, as a tree. A token sees passage, question
and its own ancestors:

    columns   passage  q1  q2 | The  1889  tower |                    row 0: " The" and " 1889" begin, " tower" follows " The"
    tower     x x x x  x   -  |  x    -     x    |

When a row's tree outgrows its share of `micro_tokens` it is forgotten; what is needed of it later is fed again.

Input: prompts from encode.py. Used by: predict.py (--decode exact).
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qa.llama.cache import KVCache, forward_tokens
from qa.llama.candidates import ROOT, Trie, make_trie
from qa.llama.encode import Passage, Prompt
from qa.llama.generate import Reading, chosen_log_probs, drop_ended_rows, read, read_prefix, score
from qa.llama.packing import micro_batches
from qa.llama.prompt import PromptTemplate

# Q questions of a batch, T tokens fed in a pass, A ancestors of the deepest, N continuations of all of them

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


@torch.inference_mode()
def extract(model, template: PromptTemplate, prompts: Sequence[Prompt], texts: Mapping[Passage, str],
            max_answer_length: int, micro_tokens: int, num_best: int = 1, max_expansions: int = 0,
            report: Callable[[int], object] = lambda num_done: None) -> list[Extraction]:
    """Find the most probable spans for every prompt; they stand in the prompts' order.

    Args:
        texts: what each passage, or piece of one, says.
        max_answer_length: tokens of a span at most, the end token included.
        micro_tokens: tokens read in one batch, padding included; bounds the memory: cache, tokens of a pass and logits.
        max_expansions: a search that has expanded so many prefixes ends without proof, once it has found a span; 0: none does.
        report: called after every batch with the number of its prompts.
    """
    prefix = read_prefix(model, template.prefix_ids)
    found: dict[Prompt, Extraction] = {}
    for rows in micro_batches(prompts, 0, micro_tokens):
        reading = read(model, rows, template.prefix_ids, prefix)
        refusals = [None] * len(reading.prompts)
        if template.refusal:
            answers = [template.answer_ids(template.refusal)] * len(refusals)
            refusals = score(model, reading, template, answers, _logit_rows(model, micro_tokens))
        tries = {row.passage: make_trie(template, texts[row.passage], max_answer_length) for row in rows}
        searches = [Search(prompt, tries[prompt.passage], num_best, max_expansions) for prompt in reading.prompts]
        search(model, reading, template, searches, micro_tokens)
        for of_prompt, refusal in zip(searches, refusals, strict=True):
            found[of_prompt.prompt] = of_prompt.result(texts[of_prompt.prompt.passage], refusal)
        report(len(reading.prompts))
    return [found[prompt] for prompt in prompts]


def _logit_rows(model, micro_tokens: int) -> int:
    """So many rows of logits take no more memory than the hidden states of a batch that is read."""
    return max(micro_tokens * model.config.hidden_size // model.config.vocab_size, 1)


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
            raise ValueError(f"question {self.prompt.id}: the model's logits are not finite")
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
        offset, spans = self.prompt.passage.start_char, []
        for log_prob, negative in sorted(self.best, reverse=True):
            start, end = self.trie.spans[-negative]
            spans.append(Span(text[start:end], offset + start, offset + end, log_prob))
        return Extraction(self.prompt, spans, self.num_best, self.open_bound, self.num_expanded, self.num_passes,
                          self.num_positions, refusal_log_prob)


def search(model, reading: Reading, template: PromptTemplate, searches: Sequence[Search], micro_tokens: int) -> None:
    """Run the searches of a batch to their ends, together. The reading's cache is used up."""
    chunk = _logit_rows(model, micro_tokens)
    _expand(model, template, reading.hidden, [(of_question, ROOT) for of_question in searches], chunk)
    cache, begin, rows = reading.cache, reading.cache.length, reading.rows.tolist()
    while open_questions := [q for q, of_question in enumerate(searches) if not of_question.is_done]:
        cache, rows = drop_ended_rows(cache, rows, open_questions)
        room = max(micro_tokens // cache.segments.shape[0], 1)  # columns for a row's tree
        if cache.length > begin + room:
            cache.length = begin
            for of_question in searches:
                of_question.columns.clear()
        fed = _choose(cache, searches, open_questions, rows, room)
        hidden = _feed(model, reading, cache, searches, fed, rows)  # [T, H]
        fresh = [t for t, (q, node) in enumerate(fed) if node in searches[q].fresh]
        _expand(model, template, hidden[fresh], [(searches[q], node) for q, node in (fed[t] for t in fresh)], chunk)


def _choose(cache: KVCache, searches: Sequence[Search], open_questions: list[int], rows: list[int],
            room: int) -> list[tuple[int, int]]:
    """(question, node) of all tokens of a pass. A row's questions take turns until it is full; the others wait."""
    fed, taken = [], Counter()
    for q in open_questions:
        nodes = searches[q].choose(room - taken[rows[q]], at_least_one=not taken[rows[q]])
        for node in nodes:
            searches[q].columns[node] = cache.length + taken[rows[q]]
            taken[rows[q]] += 1
        searches[q].num_passes += bool(nodes)
        searches[q].num_positions += len(nodes)
        fed += [(q, node) for node in nodes]
    return fed


def _feed(model, reading: Reading, cache: KVCache, searches: Sequence[Search], fed: list[tuple[int, int]],
          rows: list[int]) -> Tensor:
    """Run the model on these nodes: [T, H]."""
    device = reading.hidden.device
    questions = torch.tensor([q for q, _ in fed], device=device)  # [T]
    ids = torch.tensor([searches[q].trie.tokens[node] for q, node in fed], device=device)
    seen = [[searches[q].columns[step] for step in searches[q].trie.path(node)] for q, node in fed]
    depth = max(map(len, seen))
    positions = reading.positions[questions] + torch.tensor([len(columns) - 1 for columns in seen], device=device)
    seen = torch.tensor([columns + columns[-1:] * (depth - len(columns)) for columns in seen], device=device)  # [T, A]
    end, capacity = int(seen.max()) + 1, cache.segments.shape[1]
    if end > capacity:
        cache.reserve(end + capacity // 2)  # not in every pass anew
    return forward_tokens(model, cache, torch.tensor(rows, device=device)[questions], ids, positions,
                          reading.segments[questions], seen=seen)


def _expand(model, template: PromptTemplate, hidden: Tensor, nodes: list[tuple[Search, int]], chunk: int) -> None:
    """Tell the searches what follows their nodes. hidden: [T, H], behind each node."""
    children = [of_question.trie.children[node] for of_question, node in nodes]
    counts = [len(of_node) for of_node in children]
    owners = torch.arange(len(nodes), device=hidden.device).repeat_interleave(torch.tensor(counts, device=hidden.device))  # [N]
    tokens = torch.tensor([token for of_node in children for token in of_node], dtype=torch.int64, device=hidden.device)  # [N]
    log_probs, end_log_probs = chosen_log_probs(model, template, hidden, owners, tokens, chunk)  # [N], [T]
    log_probs, end_log_probs, begin = log_probs.tolist(), end_log_probs.tolist(), 0
    for (of_question, node), count, end_log_prob in zip(nodes, counts, end_log_probs, strict=True):
        of_question.expand(node, log_probs[begin : begin + count], end_log_prob)
        begin += count


def best_spans(extractions: Sequence[Extraction]) -> list[Extraction]:
    """One per example, of passages read in pieces: the most probable spans of all pieces, each text once.

    Its `refusal_log_prob` is the least of all pieces: a passage answers if one of its pieces does.
    """
    by_example: dict[int, list[Extraction]] = {}
    for extraction in extractions:
        by_example.setdefault(extraction.prompt.index, []).append(extraction)
    chosen = []
    for pieces in by_example.values():
        spans: dict[str, Span] = {}
        for span in sorted((span for piece in pieces for span in piece.spans), key=lambda span: (-span.log_prob, span[1:3])):
            spans.setdefault(span.text, span)
        counts = ("num_expanded", "num_passes", "num_positions")
        totals = {name: sum(getattr(piece, name) for piece in pieces) for name in counts}
        refusals = [piece.refusal_log_prob for piece in pieces if piece.refusal_log_prob is not None]
        first = pieces[0]
        chosen.append(replace(first, spans=list(spans.values())[: first.num_best], refusal_log_prob=min(refusals, default=None),
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
