"""Our attention against the plain formula under autograd, to 1e-12 in fp64; what is masked has no influence at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qa.bert.model import load_bert
from qa.cpu.attention import attention
from qa.cpu.dropout import keep_words

SHAPE = B, H, L, D = 3, 2, 17, 8


def random_inputs(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """query, key, value: [B, h, L, d] with a gradient, in the memory order in which transformers hands them over."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(B, L, H, D, dtype=torch.float64, generator=generator).transpose(1, 2) for _ in range(3)]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def padding_mask() -> Tensor:
    """[B, 1, L, L]: the windows have 17, 11 and 1 tokens."""
    return (torch.arange(L) < torch.tensor([17, 11, 1])[:, None])[:, None, None, :].expand(B, 1, L, L)


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keep: Tensor | None, p: float) -> Tensor:
    """softmax(Q K^T / sqrt(d)), masked, with dropout by an explicit mask, times V: [B, L, h, d]."""
    scores = query @ key.transpose(2, 3) / D ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1)
    if keep is not None:
        weights = weights * keep / (1 - p)
    return (weights @ value).transpose(1, 2)


def output_and_gradients(function, inputs: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    output = function(*inputs)
    return [output, *torch.autograd.grad(output, inputs, cotangent.to(output.dtype))]


def assert_all_close(found: list[Tensor], expected: list[Tensor], relative: float) -> None:
    for name, one, other in zip(("output", "query", "key", "value"), found, expected, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other.double()).abs().max() <= relative * other.double().abs().max(), name


@pytest.fixture
def cotangent() -> Tensor:
    return torch.randn(B, L, H, D, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("mask", [None, padding_mask()], ids=["all", "padded"])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
def test_output_and_gradients_equal_the_plain_formula(mask, p, cotangent):
    """With dropout too: the mask is drawn again from the same seed."""
    inputs = random_inputs(torch.float64)
    torch.manual_seed(5)
    found = output_and_gradients(lambda q, k, v: attention(None, q, k, v, mask, dropout=p)[0], inputs, cotangent)
    torch.manual_seed(5)
    keep = (keep_words(torch.Size((B * H, L, L)), torch.float64, p) != 0).view(B, H, L, L) if p else None
    expected = output_and_gradients(lambda q, k, v: plain(q, k, v, mask, keep, p), inputs, cotangent)
    assert_all_close(found, expected, 1e-12)


@pytest.mark.parametrize("dtype, relative", [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.003)])
@pytest.mark.parametrize("mask", [None, padding_mask()], ids=["all", "padded"])
def test_narrow_types_are_close(dtype, relative, mask, cotangent):
    inputs = random_inputs(dtype)
    found = output_and_gradients(lambda q, k, v: attention(None, q, k, v, mask)[0], inputs, cotangent)
    assert all(tensor.dtype == dtype for tensor in found)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = output_and_gradients(lambda q, k, v: plain(q, k, v, mask, None, 0.0), wide, cotangent)
    assert_all_close(found, expected, relative)


def test_path_without_gradients_is_close_to_the_path_with():
    inputs = random_inputs(torch.float64)
    for mask in (None, padding_mask()):
        with torch.no_grad():
            found = attention(None, *inputs, mask)[0]
        assert (found - attention(None, *inputs, mask)[0]).abs().max() <= 1e-12


def test_given_scaling_replaces_the_default(cotangent):
    inputs = random_inputs(torch.float64)
    found = output_and_gradients(lambda q, k, v: attention(None, q, k, v, None, scaling=0.7)[0], inputs, cotangent)
    expected = output_and_gradients(lambda q, k, v: plain(q * 0.7 * D ** 0.5, k, v, None, None, 0.0), inputs, cotangent)
    assert_all_close(found, expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_masked_keys_have_exactly_no_influence(dtype, with_gradients):
    inputs = [tensor.detach() for tensor in random_inputs(dtype)]
    mask = padding_mask()
    hidden = ~mask[:, 0, 0]  # [B, L]
    changed = [tensor.clone() for tensor in inputs]
    for tensor in changed[1:]:  # keys and values
        tensor.transpose(1, 2)[hidden] += 100
    with torch.set_grad_enabled(with_gradients):
        assert torch.equal(attention(None, *inputs, mask)[0], attention(None, *changed, mask)[0])
    changed[2].transpose(1, 2)[0, 3] += 1e-2  # while a key that is seen has some
    assert not torch.equal(attention(None, *inputs, mask)[0], attention(None, *changed, mask)[0])


def test_masked_keys_get_exactly_no_gradient(cotangent):
    inputs = random_inputs(torch.float32)
    mask = padding_mask()
    _, _, grad_key, grad_value = output_and_gradients(lambda q, k, v: attention(None, q, k, v, mask, dropout=0.1)[0],
                                                      inputs, cotangent)
    hidden = ~mask[:, 0, 0]
    assert not grad_key.transpose(1, 2)[hidden].any() and not grad_value.transpose(1, 2)[hidden].any()


@pytest.mark.parametrize("training", [True, False])
def test_padding_tokens_have_exactly_no_influence_through_the_whole_model(training, tiny_bert_folder):
    """transformers hands the mask over: a function that is not registered for masks silently gets none."""
    model = load_bert(tiny_bert_folder, 128, dropout=0.0)[0].train(training)
    token_ids = torch.randint(5, 600, (3, 20), generator=torch.Generator().manual_seed(0))
    real = torch.arange(20) < torch.tensor([20, 12, 5])[:, None]
    types = (torch.arange(20) > 4).long().expand(3, 20)
    changed = torch.where(real, token_ids, (token_ids + 123) % 600)
    with torch.set_grad_enabled(training):
        for before, after in zip(model(token_ids, real, types), model(changed, real, types), strict=True):
            assert torch.equal(before[real], after[real]) and not torch.equal(before[~real], after[~real])


def test_autocast_on_the_cpu_trains_in_both_half_precisions(tiny_bert_folder):
    """Forward under autocast, backward outside it, as in the training step: the gradients are close to fp32's."""
    model, _ = load_bert(tiny_bert_folder, 128, dropout=0.0)
    token_ids = torch.randint(5, 600, (4, 24), generator=torch.Generator().manual_seed(0))
    real = torch.arange(24) < torch.tensor([24, 20, 12, 7])[:, None]
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            start, end = model(token_ids, real, torch.zeros_like(token_ids))
        (start[real].square().mean() + end[real].square().mean()).backward()
        gradients[dtype] = torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])
    for dtype, relative in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        error = (gradients[dtype] - gradients[torch.float32]).norm() / gradients[torch.float32].norm()
        assert error < relative, (dtype, error)
