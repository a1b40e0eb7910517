"""Exact decoding of many questions at once: the searches of schedule.py, run by the model. Skip on first reading.

search.py says what is searched, and why the result is exact. Here a forward pass serves all questions of a micro-batch, each
with several prefixes. The passage is read once (reading.py), and each prefix is fed once: the tokens stay in the cache, as a
tree. A token sees the passage, its question and its own ancestors in the tree:

    columns    passage  q1  q2 | The  1889  tower |        row 0: " The" and " 1889" were fed; " tower" follows " The"
    tower      x x x x  x   -  |  x    -     x    |

When a row's tree is larger than its share of `micro_tokens`, the cache forgets it; what is needed of it later is fed again.

Input: prompts from encode.py. Used by: llama/reader.py (--decode exact).

Letters: Q questions of a micro-batch, T tokens fed in a pass, A ancestors of the deepest and itself, N continuations of all,
H hidden size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from qa.llama.cache import KVCache, forward_tokens
from qa.llama.candidates import ROOT
from qa.llama.candidates_fast import make_trie_fast
from qa.llama.encode import Prompt
from qa.llama.memory import PassageMemory
from qa.llama.prompt import PromptTemplate
from qa.llama.reading import Reading, chosen_log_probs, drop_ended_rows, logit_rows, read, refusal_log_probs
from qa.llama.rivals import Rivals
from qa.llama.schedule import Search
from qa.llama.search import Extraction


@torch.inference_mode()
def extract(model, template: PromptTemplate, prompts: Sequence[Prompt], max_answer_length: int, micro_tokens: int,
            num_best: int = 1, max_expansions: float = math.inf, memory: PassageMemory | None = None,
            rivals: Rivals | None = None) -> list[Extraction]:
    """Find the most probable spans for every prompt, in order.

    Args:
        max_answer_length: tokens of a span at most, the end token included.
        micro_tokens: bounds the memory: tokens of a pass, padding included, logits, and (unless one row is longer) the cache.
        max_expansions: after this number of prefixes a search ends without proof, once it has found a span.
        memory: of passages, which are then not read again (reading.py).
        rivals: if all prompts ask the same question, and only its best answers over all passages are wanted (rivals.py).
    """
    chunk = logit_rows(model, micro_tokens)
    found: dict[Prompt, Extraction] = {}
    for reading in read(model, template, prompts, micro_tokens, memory):
        pieces = {prompt.piece for prompt in reading.prompts}  # a GPU is still reading them while we make their tries
        tries = {piece: make_trie_fast(template, piece.text, max_answer_length) for piece in pieces}
        refusals = refusal_log_probs(model, reading, template, chunk)
        searches = [Search(prompt, tries[prompt.piece], num_best, max_expansions, refusal, rivals,
                           rivals is not None and rivals.refuses(refusal))
                    for prompt, refusal in zip(reading.prompts, refusals, strict=True)]
        _run_searches(model, reading, template, searches, micro_tokens, chunk)
        for search in searches:
            found[search.prompt] = search.result()
    return [found[prompt] for prompt in prompts]


def _run_searches(model, reading: Reading, template: PromptTemplate, searches: list[Search], micro_tokens: int,
                  chunk: int) -> None:
    """Run the searches of a micro-batch to their ends. The reading's cache is used up. chunk: rows of logits at a time."""
    _expand(model, template, reading.hidden, [(search, ROOT) for search in searches], chunk)
    cache, begin, rows = reading.cache, reading.cache.length, reading.rows.tolist()
    while open_questions := [q for q, search in enumerate(searches) if not search.is_done]:
        cache, rows = drop_ended_rows(cache, rows, open_questions)
        room = max(micro_tokens // cache.segments.shape[0], 1)  # columns for a row's tree
        if cache.length > begin + room:
            cache.length = begin
            for search in searches:
                search.columns.clear()
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
    ids = torch.tensor([searches[q].trie.token(node) for q, node in fed], device=device)
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
    """Tell the searches what follows their nodes. hidden: [T, H], of each node's token."""
    children = [search.trie.children(node) for search, node in nodes]
    before = torch.tensor([t for t, tokens in enumerate(children) for _ in tokens], dtype=torch.int64, device=hidden.device)
    tokens = torch.tensor([token for tokens in children for token in tokens], dtype=torch.int64, device=hidden.device)  # [N]
    log_probs, end_log_probs = chosen_log_probs(model, template, hidden, before, tokens, chunk)  # [N], [T]
    shares = log_probs.cpu().split([len(tokens) for tokens in children])
    for (search, node), share, end_log_prob in zip(nodes, shares, end_log_probs.tolist(), strict=True):
        search.expand(node, share.tolist(), end_log_prob)
