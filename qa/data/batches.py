"""Which items form a step, and which rank computes them. An item is a window (BERT) or a question (LLaMA).

A batch has `--batch-size` items over all ranks and micro-batches together. The plan of an epoch depends only on
(lengths, batch size, seed, epoch): neither the number of ranks nor the memory of a device changes what is learnt, and a resumed
run needs no state but the number of its step.

    epoch_plan:  shuffle all; sort each block of 50 batches by length; cut into batches; shuffle the batches
    deal:        give each item of a batch to the rank with the least work; cut into micro-batches of `micro_tokens`

Sorting makes the items of a batch similar in length, so there is little padding; each epoch has other blocks.
Used by: train_bert.py (`epoch_plan`, `deal`), train_llama.py (`passage_plan`), llama/packing.py (`deal`), bert/reader.py
(`cut`).
"""

from __future__ import annotations

import numpy as np

BLOCK_BATCHES = 50


def epoch_plan(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Cut the items 0..N-1, of `lengths` [N] tokens, into batches: arrays of item indices, in the order of the steps.

    Every item is in exactly one batch. Of the ceil(N / batch_size) batches one may be smaller than the others.
    """
    generator = np.random.default_rng([seed, epoch])
    shuffled = generator.permutation(len(lengths))
    batches = []
    for block in _slices(shuffled, BLOCK_BATCHES * batch_size):
        batches += _slices(block[np.argsort(lengths[block], kind="stable")], batch_size)
    return [batches[i] for i in generator.permutation(len(batches))]


def passage_plan(passage_index: np.ndarray, lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Like `epoch_plan`, but the questions of a passage stay together, so that a row reads it once for all of them.

    Passages are shuffled and, within blocks, sorted by length; then their questions are cut into batches of
    `batch_size` (the last one may be smaller), and the batches are shuffled. So a passage may be in more than one batch.
    `passage_index` [N]: which passage each question is about; `lengths` [N]: the tokens of each question, its passage included.
    """
    generator = np.random.default_rng([seed, epoch])
    passage_place = generator.permutation(int(passage_index.max()) + 1)[passage_index]  # [N] in the shuffled order
    shuffled = np.argsort(passage_place, kind="stable")
    longest = np.zeros(len(passage_place), dtype=np.int64)  # of each passage's questions, by the passage's place
    np.maximum.at(longest, passage_place, lengths)
    order = []
    for block in _slices(shuffled, BLOCK_BATCHES * batch_size):
        places = passage_place[block]
        order.append(block[np.lexsort((places, longest[places]))])
    batches = _slices(np.concatenate(order), batch_size)
    return [batches[i] for i in generator.permutation(len(batches))]


def _slices(array: np.ndarray, size: int) -> list[np.ndarray]:
    return [array[begin:begin + size] for begin in range(0, len(array), size)]


def deal(batch: np.ndarray, lengths: np.ndarray, num_ranks: int, micro_tokens: int,
         even: bool = False) -> list[list[np.ndarray]]:
    """Divide a batch among the ranks so that they finish together: for every rank its micro-batches of item indices.

    From the longest item to the shortest, each goes to the rank with the fewest tokens so far (Graham's rule). A
    micro-batch of B items, the longest of L tokens, has B * L <= micro_tokens; a longer item is alone in its own. A rank
    with nothing to do has no micro-batches; if `even`, all ranks have equally many, some of them with no item.
    """
    longest_first = batch[np.argsort(-lengths[batch], kind="stable")]
    loads = np.zeros(num_ranks, dtype=np.int64)
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for item in longest_first:
        rank = int(loads.argmin())
        shares[rank].append(int(item))
        loads[rank] += lengths[item]
    dealt = [cut(np.array(share, dtype=np.int64), lengths, micro_tokens) for share in shares]
    most = max(map(len, dealt)) if even else 0
    return [share + [batch[:0]] * (most - len(share)) for share in dealt]


def cut(longest_first: np.ndarray, lengths: np.ndarray, micro_tokens: int) -> list[np.ndarray]:
    """Cut items, from the longest to the shortest, into micro-batches of at most `micro_tokens`."""
    micro_batches = []
    begin = 0
    while begin < len(longest_first):
        size = max(1, micro_tokens // int(lengths[longest_first[begin]]))
        micro_batches.append(longest_first[begin:begin + size])
        begin += size
    return micro_batches


def padding_share(shares: list[list[np.ndarray]], lengths: np.ndarray) -> float:
    """The share of padding among all tokens of a batch. `shares`: what `deal` returned."""
    micro_batches = [lengths[rows] for share in shares for rows in share if len(rows)]
    return 1 - sum(int(rows.sum()) for rows in micro_batches) / sum(len(rows) * int(rows.max()) for rows in micro_batches)
