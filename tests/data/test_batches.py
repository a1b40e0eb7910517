"""The plan covers every example once and depends on nothing but its arguments; a dealt batch loses and adds nothing."""

import itertools

import numpy as np
import pytest

from qa.data.batches import BLOCK_BATCHES, cut, deal, epoch_plan, padding_share


def random_lengths(num_examples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(8, 385, num_examples)


@pytest.mark.parametrize("num_examples", [1, 5, 16, 17, 1000, 2 * 16 * BLOCK_BATCHES + 3])
@pytest.mark.parametrize("batch_size", [1, 7, 16])
def test_plan_is_a_partition_into_full_batches(num_examples, batch_size):
    plan = epoch_plan(random_lengths(num_examples), batch_size, seed=3, epoch=1)
    assert np.array_equal(np.sort(np.concatenate(plan)), np.arange(num_examples))
    sizes = [len(batch) for batch in plan]
    assert len(plan) == -(-num_examples // batch_size) and max(sizes) <= batch_size
    assert sum(size < batch_size for size in sizes) <= 1


def test_plan_is_a_pure_function_of_its_arguments():
    """The same whatever other generators do; another plan for another seed or epoch."""
    lengths = random_lengths(500)
    plan = np.concatenate(epoch_plan(lengths, 16, seed=3, epoch=1))
    np.random.seed(99)
    assert np.array_equal(np.concatenate(epoch_plan(lengths, 16, seed=3, epoch=1)), plan)
    for other in ({"seed": 4, "epoch": 1}, {"seed": 3, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert not np.array_equal(np.concatenate(epoch_plan(lengths, 16, **other)), plan)


def test_batches_are_near_in_length_but_come_in_random_order():
    lengths = random_lengths(16 * BLOCK_BATCHES * 2)
    plan = epoch_plan(lengths, 16, seed=0, epoch=0)
    padded = sum(len(batch) * lengths[batch].max() for batch in plan)
    assert padded / lengths.sum() < 1.03  # freely mixed batches: about 1.8
    longest = np.array([lengths[batch].max() for batch in plan])
    assert abs(np.corrcoef(longest, np.arange(len(plan)))[0, 1]) < 0.3
    # Companions change from epoch to epoch: no batch comes back.
    batches = [{tuple(sorted(batch)) for batch in epoch_plan(lengths, 16, 0, epoch)} for epoch in (0, 1)]
    assert not batches[0] & batches[1]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("micro_tokens", [1, 100, 384, 1000, 4096, 10**9])
def test_deal_covers_the_batch_exactly_once_within_the_bound(num_ranks, micro_tokens):
    lengths = random_lengths(200)
    for batch in epoch_plan(lengths, 16, seed=1, epoch=0) + [np.arange(2), np.arange(200)]:
        shares = deal(batch, lengths, num_ranks, micro_tokens)
        assert len(shares) == num_ranks
        micro_batches = [rows for share in shares for rows in share]
        assert sorted(np.concatenate(micro_batches)) == sorted(batch)
        for rows in micro_batches:
            assert len(rows) == 1 or len(rows) * lengths[rows].max() <= micro_tokens
        # No micro-batch could be joined with the one after it.
        for share in shares:
            for rows, following in zip(share, share[1:], strict=False):
                assert (len(rows) + 1) * lengths[np.append(rows, following)].max() > micro_tokens


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5])
def test_loads_differ_by_less_than_the_longest_example(num_ranks):
    """Graham's rule gives that: the fullest rank was the emptiest when it got its last, shortest, example."""
    for seed in range(20):
        lengths = random_lengths(16, seed)
        loads = [sum(int(lengths[rows].sum()) for rows in share)
                 for share in deal(np.arange(16), lengths, num_ranks, 1000)]
        assert max(loads) - min(loads) <= lengths.max()


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_fullest_rank_is_near_the_best_possible(num_ranks):
    """At most 4/3 - 1/(3 ranks) of the best deal's (Graham 1969), found by trying them all; lengths of every size."""
    for seed in range(10):
        lengths = np.ceil(np.random.default_rng(seed).exponential(50, 8)).astype(int)
        every_deal = np.array(list(itertools.product(range(num_ranks), repeat=8)))  # [deals, 8] a rank for each example
        loads = np.stack([(lengths * (every_deal == rank)).sum(axis=1) for rank in range(num_ranks)])
        best = loads.max(axis=0).min()
        shares = deal(np.arange(8), lengths, num_ranks, 10**9)
        fullest = max(sum(int(lengths[rows].sum()) for rows in share) for share in shares)
        assert best <= fullest <= (4 / 3 - 1 / (3 * num_ranks)) * best


def test_a_rank_may_have_nothing_to_do():
    shares = deal(np.array([4]), random_lengths(10), 3, 1000)
    assert [len(share) for share in shares] == [1, 0, 0] and shares[0][0].tolist() == [4]


def test_even_shares_differ_from_others_by_micro_batches_of_nothing():
    lengths = random_lengths(64)
    for batch, num_ranks, micro_tokens in ((np.arange(64), 3, 1), (np.arange(5), 4, 500), (np.array([4]), 3, 1000)):
        shares, even = deal(batch, lengths, num_ranks, micro_tokens), deal(batch, lengths, num_ranks, micro_tokens, even=True)
        assert {len(share) for share in even} == {max(map(len, shares))}
        assert [[rows.tolist() for rows in share if len(rows)] for share in even] == [
            [rows.tolist() for rows in share] for share in shares]
        assert padding_share(even, lengths) == padding_share(shares, lengths)


def test_deal_does_not_depend_on_the_order_of_equal_work():
    """The same examples on the same rank, whatever the memory of a device: micro_tokens only cuts."""
    lengths = random_lengths(64)
    whole = deal(np.arange(64), lengths, 3, 10**9)
    for micro_tokens in (50, 500, 2000):
        for share, one in zip(deal(np.arange(64), lengths, 3, micro_tokens), whole, strict=True):
            assert np.array_equal(np.concatenate(share), one[0])


def test_cut_of_nothing_is_nothing():
    assert cut(np.array([], dtype=np.int64), random_lengths(3), 100) == []


def test_padding_share_counts_the_cells_of_the_padded_batches():
    lengths = np.array([10, 6, 5, 1])
    shares = [[np.array([0, 1])], [np.array([2]), np.array([3])], []]
    assert padding_share(shares, lengths) == pytest.approx(4 / 26)
