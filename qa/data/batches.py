"""Which examples form step t, and who computes them.

A batch is a global batch: `--batch-size` examples over all ranks and micro-batches together. The plan of an epoch is a pure
function of (lengths, batch size, seed, epoch), so neither the number of ranks nor the memory of one device changes
what is learnt, and a resumed run needs no state but the number of the step.

    plan:  shuffle all; sort blocks of 50 batches by length; cut into batches; shuffle the batches
    deal:  one batch -> ranks, each to the least loaded -> micro-batches of at most `micro_tokens` padded tokens

Blocks keep a batch's windows near in length, so little is padded, while each epoch's blocks differ. Used by train_bert.py;
train_llama.py plans whole passages with the same functions.
"""

from __future__ import annotations

import numpy as np

BLOCK_BATCHES = 50


def epoch_plan(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Cut the examples 0..N-1 into batches.

    Args:
        lengths: [N] tokens of each example.
        batch_size: examples of a batch; one batch of the epoch may be smaller.

    Returns:
        ceil(N / batch_size) arrays of example indices, in the order of the steps; every example is in exactly one.
    """
    generator = np.random.default_rng([seed, epoch])
    shuffled = generator.permutation(len(lengths))
    batches = []
    for begin in range(0, len(shuffled), BLOCK_BATCHES * batch_size):
        block = shuffled[begin:begin + BLOCK_BATCHES * batch_size]
        block = block[np.argsort(lengths[block], kind="stable")]
        batches += [block[i:i + batch_size] for i in range(0, len(block), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def passage_plan(passage_index: np.ndarray, lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """As `epoch_plan`, but the questions of a passage stay together, so that a row can read it once for all of them.

    Passages are shuffled, sorted by length within blocks, and their questions cut into batches of exactly `batch_size`:
    a passage's questions may fall into two neighbouring batches.

    Args:
        passage_index: [N] which passage each question is about.
        lengths: [N] tokens of each question, its passage included.
    """
    generator = np.random.default_rng([seed, epoch])
    rank_of_passage = generator.permutation(int(passage_index.max()) + 1)[passage_index]  # [N]
    shuffled = np.argsort(rank_of_passage, kind="stable")
    longest = np.zeros(len(rank_of_passage), dtype=np.int64)  # by rank: the passage's longest question
    np.maximum.at(longest, rank_of_passage, lengths)
    order = []
    for begin in range(0, len(shuffled), BLOCK_BATCHES * batch_size):
        block = shuffled[begin:begin + BLOCK_BATCHES * batch_size]
        ranks = rank_of_passage[block]
        order.append(block[np.lexsort((ranks, longest[ranks]))])
    questions = np.concatenate(order)
    batches = [questions[i:i + batch_size] for i in range(0, len(questions), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def deal(batch: np.ndarray, lengths: np.ndarray, num_ranks: int, micro_tokens: int) -> list[list[np.ndarray]]:
    """Give a global batch to the ranks so that they finish together, and cut each share into micro-batches.

    Longest first, each example goes to the rank with the fewest tokens so far (Graham's rule). A micro-batch of B
    examples, the longest of L tokens, has B * L <= micro_tokens; a single longer example stands alone.

    Returns:
        For every rank a list of micro-batches (arrays of example indices); empty for a rank with nothing to do.
    """
    longest_first = batch[np.argsort(-lengths[batch], kind="stable")]
    loads = np.zeros(num_ranks, dtype=np.int64)
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for example in longest_first:
        rank = int(loads.argmin())
        shares[rank].append(int(example))
        loads[rank] += lengths[example]
    return [cut(np.array(share, dtype=np.int64), lengths, micro_tokens) for share in shares]


def cut(longest_first: np.ndarray, lengths: np.ndarray, micro_tokens: int) -> list[np.ndarray]:
    """Cut examples, ordered from the longest to the shortest, into micro-batches of at most `micro_tokens`."""
    micro_batches = []
    begin = 0
    while begin < len(longest_first):
        size = max(1, micro_tokens // int(lengths[longest_first[begin]]))
        micro_batches.append(longest_first[begin:begin + size])
        begin += size
    return micro_batches


def padding_share(shares: list[list[np.ndarray]], lengths: np.ndarray) -> float:
    """The share of padding among all tokens that the ranks compute for one batch, `shares` as `deal` gives them."""
    micro_batches = [lengths[rows] for share in shares for rows in share]
    return 1 - sum(int(rows.sum()) for rows in micro_batches) / sum(len(rows) * int(rows.max()) for rows in micro_batches)
