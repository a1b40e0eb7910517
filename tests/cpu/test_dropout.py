"""Dropout: the masks are Bernoulli, independent, the same in both passes, and governed by torch.manual_seed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from qa.cpu.dropout import Dropout, dropout, keep_bits, keep_words, replace_dropout

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def keep_mask(shape, dtype=torch.float32, p=0.1) -> torch.Tensor:
    return keep_words(torch.Size(shape), dtype, p) != 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.01, 0.1, 1 / 3, 0.5, 0.9])
def test_keep_rate_is_within_four_sigma(dtype, p):
    torch.manual_seed(0)
    num_words = 2**20
    kept = keep_mask((num_words,), dtype, p).sum().item()
    assert abs(kept - (1 - p) * num_words) < 4 * math.sqrt(p * (1 - p) * num_words)


@pytest.mark.parametrize("dtype, word", [(torch.float64, torch.int64), (torch.float32, torch.int32),
                                         (torch.bfloat16, torch.int16), (torch.float16, torch.int16)])
def test_words_are_all_ones_or_all_zeros(dtype, word):
    words = keep_words(torch.Size((3, 5, 7)), dtype, 0.4)
    assert words.dtype == word and words.shape == (3, 5, 7) and set(words.unique().tolist()) == {-1, 0}


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_values_are_scaled_exactly_and_dropped_ones_are_zero(dtype):
    x = torch.randn(64, 33, dtype=torch.float64).to(dtype)
    x[0, 0] = -0.0
    torch.manual_seed(1)
    y = dropout(x, 0.1, training=True)
    torch.manual_seed(1)
    keep = keep_mask(x.shape, dtype, 0.1)
    assert y.dtype == dtype and 0 < (~keep).sum() < x.numel()
    assert torch.equal(y[keep], x[keep] * (1 / 0.9)) and not y[~keep].any()


def test_expectation_is_the_input():
    torch.manual_seed(2)
    x = torch.linspace(-2, 2, 50, dtype=torch.float64)
    mean = dropout(x.expand(20_000, 50), 0.1, training=True).mean(0)
    assert ((mean - x).abs() <= 5 * x.abs() * math.sqrt(0.1 / 0.9 / 20_000)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_uses_the_same_mask(dtype):
    x = torch.ones(40, 30, dtype=dtype).t().requires_grad_()  # and not contiguous
    y = dropout(x, 0.3, training=True)
    y.sum().backward()  # the gradient comes expanded: not contiguous either
    assert torch.equal(x.grad, y.detach()) and 0 < (y == 0).sum() < y.numel()


def test_gradient_is_that_of_a_product_with_the_mask():
    x = torch.randn(11, 13, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 13, dtype=torch.float64)
    torch.manual_seed(3)
    (dropout(x, 0.4, training=True) ** 2 * weight).sum().backward()
    torch.manual_seed(3)
    keep = keep_mask(x.shape, torch.float64, 0.4)
    assert torch.allclose(x.grad, 2 * x * weight * keep / 0.6**2, rtol=1e-14)


def test_masks_are_governed_by_torchs_cpu_generator():
    x = torch.ones(1000)
    torch.manual_seed(7)
    np.random.seed(1)
    state = torch.get_rng_state()
    first, second = dropout(x, 0.5, True), dropout(x, 0.5, True)
    assert not torch.equal(first, second)
    np.random.seed(2)
    torch.set_rng_state(state)
    assert torch.equal(dropout(x, 0.5, True), first) and torch.equal(dropout(x, 0.5, True), second)
    torch.manual_seed(8)
    assert not torch.equal(dropout(x, 0.5, True), first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_are_not_correlated(dtype):
    """Between neighbours (those cut from one 64-bit draw among them), rows, heads, and successive calls."""
    torch.manual_seed(4)
    mask, following = (keep_mask((8, 4, 64, 64), dtype, 0.1).double() - 0.9 for _ in range(2))
    flat = mask.reshape(-1)
    pairs = {f"{lag} words apart": (flat[lag:], flat[:-lag]) for lag in (1, 2, 3, 4, 5, 8, 16)}
    pairs |= {"rows": (mask[:, :, 1:], mask[:, :, :-1]), "heads": (mask[:, 1:], mask[:, :-1]),
              "examples": (mask[1:], mask[:-1]), "calls": (mask, following), "transposed": (mask, mask.transpose(2, 3))}
    for name, (one, other) in pairs.items():
        if name == "transposed":
            upper = torch.ones(64, 64).triu(1).bool()
            one, other = one[..., upper], other[..., upper]
        correlation = (one * other).mean() / (0.1 * 0.9)
        assert abs(correlation) < 4.5 / math.sqrt(one.numel()), name


def test_neighbouring_seeds_give_different_masks():
    masks = []
    for seed in range(8):
        torch.manual_seed(seed)
        masks.append(keep_mask((4096,), p=0.5).double() - 0.5)
    for one, other in itertools.combinations(masks, 2):
        assert abs((one * other).mean() / 0.25) < 4.5 / math.sqrt(4096)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_probabilities(dtype):
    x = torch.ones(2000, dtype=dtype)
    assert dropout(x, 0.0, training=True) is x
    assert not dropout(x, 1.0, training=True).any()  # as nn.Dropout(1.0)
    assert keep_mask((2000,), dtype, 0.0).all()
    assert keep_mask((2000,), dtype, 1e-9).all()
    assert not keep_mask((2000,), dtype, 1 - 1e-9).any()
    assert dropout(torch.ones(0, 3, dtype=dtype), 0.5, training=True).shape == (0, 3)


def test_evaluation_is_the_identity():
    x, module = torch.randn(10), Dropout(0.5).eval()
    state = torch.get_rng_state()
    assert module(x) is x and dropout(x, 0.5, training=False) is x
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(module.train()(x), x)


def test_keep_bits_in_place_and_not():
    x = torch.arange(1.0, 9.0)
    words = torch.tensor([-1, 0] * 4, dtype=torch.int32)
    expected = torch.tensor([1.0, 0, 3, 0, 5, 0, 7, 0])
    assert torch.equal(keep_bits(x, words), expected) and torch.equal(x, torch.arange(1.0, 9.0))
    assert torch.equal(keep_bits(x, words, in_place=True), expected) and torch.equal(x, expected)


def test_replace_dropout_counts_and_keeps_probability_and_mode():
    class Alpha(nn.Dropout):
        pass

    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.0), nn.ReLU(), Alpha(0.2)))
    model[2].eval()
    assert replace_dropout(model) == 2
    assert type(model[0]) is Dropout and model[0].p == 0.3 and model[0].training
    assert type(model[2][0]) is Dropout and model[2][0].p == 0.0 and not model[2][0].training
    assert type(model[2][2]) is Alpha  # somebody's own kind of dropout stays
    assert replace_dropout(model) == 0
