"""The reference for exact decoding: "exact-extract" as Castel et al. 2021 (arXiv:2108.05857, section 3) describe it.

For every start in the passage one row is run, teacher-forced: the `max_answer_length` tokens that follow there. One row
scores all spans that begin at its start, as they share their beginnings:

    log P(t_i .. t_j, end | prompt) = sum_k log P(t_k | prompt, t_i .. t_{k-1}) + log P(end | prompt, t_i .. t_j)

and the best of all starts and ends is the answer. The paper's candidates are the runs of the passage's tokens as T5 sees
them. Here they are those of qa/llama/candidates.py, so that both algorithms answer the same question: a row is a path of
the trie that ends in a leaf, a node's score being taken from one of its rows. As in the paper the prompt is read once
(the encoder's part there, the KV cache's here), and nothing is shared between rows. Used by: llama_decoding.py.
"""

from __future__ import annotations

import copy
import math

import torch

from qa.llama.candidates import ROOT, Trie
from qa.llama.candidates_fast import make_trie_fast
from qa.llama.encode import Prompt
from qa.llama.prompt import PromptTemplate

# R rows, n tokens of the longest, V vocabulary

ROWS = 8  # at a time


@torch.inference_mode()
def reference_extract(model, template: PromptTemplate, prompt: Prompt, text: str,
                      max_answer_length: int) -> tuple[tuple[int, int] | None, float, int]:
    """The most probable span of one passage.

    Args:
        text: what the passage says.
        max_answer_length: tokens of a span at most, the end token included.

    Returns:
        [start_char, end_char) in `text`, log P(span, end | prompt), and the number of tokens fed behind the prompt.
    """
    trie = make_trie_fast(template, text, max_answer_length)
    rows = paths_to_leaves(trie)  # of nodes
    before = torch.tensor([template.instruction_ids + prompt.piece.ids + prompt.question_ids], device=model.device)
    prompt_read = model(before, use_cache=True, logits_to_keep=1)
    best, best_node, num_positions = -math.inf, None, 0
    for begin in range(0, len(rows), ROWS):
        part = rows[begin : begin + ROWS]
        log_probs = row_log_probs(model, trie, part, prompt_read)  # [R, n + 1, V]
        num_positions += len(part) * (log_probs.shape[1] - 1)
        ends = log_probs[:, :, template.end_token_ids].logsumexp(dim=-1)  # [R, n + 1]
        for row, nodes in enumerate(part):
            tokens = torch.tensor([trie.token(node) for node in nodes], device=model.device)
            prefixes = log_probs[row, torch.arange(len(nodes)), tokens].cumsum(dim=0)  # [n]
            scores = (prefixes + ends[row, 1 : len(nodes) + 1]).tolist()
            for node, score in zip(nodes, scores, strict=True):
                if trie.span(node) is not None and score > best:
                    best, best_node = score, node
    return None if best_node is None else trie.span(best_node), best, num_positions


def paths_to_leaves(trie: Trie) -> list[list[int]]:
    paths, found = [[]], []
    while paths:
        path = paths.pop()
        children = trie.children(path[-1] if path else ROOT).values()
        paths += [[*path, child] for child in children]
        found += [] if children or not path else [path]
    return found


def row_log_probs(model, trie: Trie, rows: list[list[int]], prompt_read) -> torch.Tensor:
    """What follows the prompt, and then each token of a row: [R, n + 1, V], n the longest row's length."""
    width = max(map(len, rows))
    ids = torch.tensor([[trie.token(node) for node in nodes] + [0] * (width - len(nodes)) for nodes in rows])  # [R, n]
    cache = copy.deepcopy(prompt_read.past_key_values)
    cache.batch_repeat_interleave(len(rows))
    logits = model(ids.to(model.device), past_key_values=cache, use_cache=True).logits  # padding stands behind all that counts
    first = prompt_read.logits.expand(len(rows), 1, -1)
    return torch.cat([first, logits], dim=1).float().log_softmax(dim=-1)
