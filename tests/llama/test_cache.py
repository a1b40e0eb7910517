"""The KV cache of packed rows, and the forward pass over it, against whole forward passes of transformers' model."""

from __future__ import annotations

import random

import pytest
import torch

from qa.llama.attention import use_packed_attention
from qa.llama.cache import GROWTH, KVCache, forward_tokens

CPU = torch.device("cpu")


def test_a_cache_of_two_rows():
    """3 tokens, two of row 0 and one of row 1; one layer, one head of size 1."""
    cache = KVCache(2, capacity=2, device=CPU)
    cache.rows, cache.columns, cache.end = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), 2
    new = torch.tensor([5.0, 6.0, 7.0]).view(1, 1, 3, 1)  # [1, kv, T, d]
    keys, values = cache.update(new, -new, layer_idx=0)
    assert keys.tolist() == [[[[5.0], [6.0]]], [[[7.0], [0.0]]]]  # [B, kv, C, d]
    assert torch.equal(values, -keys)
    cache.segments[:] = torch.tensor([[0, 1], [0, -1]])
    cache.length = 2

    selected = cache.select(torch.tensor([1, 0, 1]))
    assert selected.keys[0][..., 0, 0].tolist() == [[7.0, 0.0], [5.0, 6.0], [7.0, 0.0]]
    assert (selected.segments.tolist(), selected.length) == ([[0, -1], [0, 1], [0, -1]], 2)

    cache.reserve(3)
    assert cache.segments.shape == (2, 2 + GROWTH)
    assert cache.segments[:, :3].tolist() == [[0, 1, -1], [0, -1, -1]] and (cache.segments[:, 3:] == -1).all()
    assert cache.keys[0][..., 0, 0][:, :3].tolist() == [[5.0, 6.0, 0.0], [7.0, 0.0, 0.0]]
    assert torch.equal(cache.values[0], -cache.keys[0]) and cache.get_seq_length() == 2

    cache.hide(torch.tensor([0]), torch.tensor([1]))
    assert cache.segments[:, :2].tolist() == [[0, -1], [0, -1]] and selected.segments[1].tolist() == [0, 1]


@torch.no_grad()
def alone(model, ids: list[int]) -> torch.Tensor:
    """[H] behind the last of these tokens, by a plain forward pass."""
    return model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]


@torch.no_grad()
def feed(model, cache: KVCache, tokens: list[tuple[int, int, int, int]], **more) -> torch.Tensor:
    """[T, H] behind tokens of (row, id, position, segment)."""
    return forward_tokens(model, cache, *torch.tensor(tokens).T.contiguous(), **more)


def test_passes_over_the_cache_equal_one_without(tiny_llama, monkeypatch):
    """3 rows of a passage and two questions each, of unequal lengths, fed a few tokens at a time; the cache grows often."""
    monkeypatch.setattr("qa.llama.cache.GROWTH", 4)
    rng = random.Random(0)
    use_packed_attention(tiny_llama)
    cache, read = KVCache(3, 0, CPU), {}
    for segments in [(0,), (0,), (1, 2), (2,), (2, 1), (1,)]:
        tokens, expected = [], []
        for row in range(3):
            for segment in segments:
                for _ in range(rng.randint(row == 0, 4)):
                    before = read.get((row, 0), []) + (read.setdefault((row, segment), []) if segment else [])
                    id = rng.randrange(384)
                    tokens.append((row, id, len(before), segment))
                    expected.append(alone(tiny_llama, [*before, id]))
                    read.setdefault((row, segment), []).append(id)
        torch.testing.assert_close(feed(tiny_llama, cache, tokens), torch.stack(expected), atol=1e-4, rtol=0)


@pytest.fixture
def passage(tiny_llama):
    """A cache that holds a passage of 3 tokens."""
    use_packed_attention(tiny_llama)
    cache = KVCache(1, 3, CPU)
    feed(tiny_llama, cache, [(0, 11, 0, 0), (0, 12, 1, 0), (0, 13, 2, 0)])
    return cache


def test_a_look_ahead_leaves_no_trace(tiny_llama, passage):
    untouched = passage.select(torch.tensor([0]))
    looked = feed(tiny_llama, passage, [(0, 50, 3, 1), (0, 51, 4, 1), (0, 52, 3, 2)], keep=False)
    torch.testing.assert_close(looked[1], alone(tiny_llama, [11, 12, 13, 50, 51]), atol=1e-4, rtol=0)
    assert passage.length == 3
    after = [(0, 60, 3, 1), (0, 61, 4, 1)]
    assert torch.equal(feed(tiny_llama, passage, after), feed(tiny_llama, untouched, after))


def test_what_is_hidden_is_not_seen(tiny_llama, passage):
    feed(tiny_llama, passage, [(0, 50, 3, 1), (0, 51, 4, 1)])
    passage.hide(torch.tensor([0]), torch.tensor([4]))
    (hidden,) = feed(tiny_llama, passage, [(0, 60, 4, 1)])
    torch.testing.assert_close(hidden, alone(tiny_llama, [11, 12, 13, 50, 60]), atol=1e-4, rtol=0)


def test_a_token_of_a_tree_sees_its_ancestors_only(tiny_llama, passage):
    """Behind the passage: 50, then 51 and 52 both after 50; in a later pass 53 after 52, and 54 after nothing."""
    tree = feed(tiny_llama, passage, [(0, 50, 3, 1), (0, 51, 4, 1), (0, 52, 4, 1)],
                seen=torch.tensor([[3, 3], [3, 4], [3, 5]]))
    later = feed(tiny_llama, passage, [(0, 53, 5, 1), (0, 54, 3, 1)], seen=torch.tensor([[3, 5, 6], [7, 7, 7]]))
    paths = [[50], [50, 51], [50, 52], [50, 52, 53], [54]]
    expected = torch.stack([alone(tiny_llama, [11, 12, 13, *path]) for path in paths])
    torch.testing.assert_close(torch.cat([tree, later]), expected, atol=1e-4, rtol=0)
