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

The search itself, of one question, is in search.py; here many run together. Input: prompts from encode.py. Used by:
llama/reader.py (--decode exact).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from qa.llama.cache import KVCache, forward_tokens
from qa.llama.candidates import ROOT, make_trie
from qa.llama.encode import Prompt
from qa.llama.generate import Reading, chosen_log_probs, drop_ended_rows, read, read_instruction, score
from qa.llama.packing import micro_batches
from qa.llama.prompt import PromptTemplate
from qa.llama.search import Extraction, Search

# Q questions of a batch, T tokens fed in a pass, A ancestors of the deepest, N continuations of all of them


@torch.inference_mode()
def extract(model, template: PromptTemplate, prompts: Sequence[Prompt], max_answer_length: int, micro_tokens: int,
            num_best: int = 1, max_expansions: int = 0) -> list[Extraction]:
    """Find the most probable spans for every prompt; they stand in the prompts' order.

    Args:
        max_answer_length: tokens of a span at most, the end token included.
        micro_tokens: tokens read at a time, padding included; bounds the memory: tokens of a pass, logits, and, but for one
            long row, the cache.
        max_expansions: a search that has expanded so many prefixes ends without proof, once it has found a span; 0: none does.
    """
    instruction = read_instruction(model, template.instruction_ids, micro_tokens)
    found: dict[Prompt, Extraction] = {}
    for rows in micro_batches(prompts, len(template.instruction_ids), micro_tokens):
        reading = read(model, rows, template.instruction_ids, instruction, micro_tokens)
        refusals = [None] * len(reading.prompts)
        if template.refusal:
            answers = [template.answer_ids(template.refusal)] * len(refusals)
            refusals = score(model, reading, template, answers, _logit_rows(model, micro_tokens))
        tries = {row.piece: make_trie(template, row.piece.text, max_answer_length) for row in rows}
        searches = [Search(prompt, tries[prompt.piece], num_best, max_expansions) for prompt in reading.prompts]
        search(model, reading, template, searches, micro_tokens)
        for of_prompt, refusal in zip(searches, refusals, strict=True):
            found[of_prompt.prompt] = of_prompt.result(of_prompt.prompt.piece.text, refusal)
    return [found[prompt] for prompt in prompts]


def _logit_rows(model, micro_tokens: int) -> int:
    """So many rows of logits take no more memory than the hidden states of a batch that is read."""
    return max(micro_tokens * model.config.hidden_size // model.config.vocab_size, 1)


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
