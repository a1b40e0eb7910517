"""Dropout (Srivastava et al. 2014) whose masks cost little on a CPU.

    y = x * keep / (1 - p),   keep ~ Bernoulli(1 - p) for every element

PyTorch draws its CPU masks one element at a time from a serial Mersenne twister: a quarter of a BERT step. Here one
random integer, as wide as the float, is drawn per element by numpy's SFC64, and arithmetic on integers turns it into an
all-ones or an all-zeros word that is ANDed with the float's bits: about ten times faster for bf16, in three cheap passes.

The stream's seed is itself drawn from PyTorch's CPU generator, so `torch.manual_seed` governs the masks as before, and
they can be drawn again from a saved generator state (resumed runs, gradient checkpointing). Elsewhere than on an eager CPU
(a GPU, torch.compile) PyTorch's own dropout is used: it is fast there. Used by attention.py; by
bert/model.py and train_llama.py through `replace_dropout`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

# float type -> (integer of the same width, bits)
_WORDS = {torch.bfloat16: (np.int16, 16), torch.float16: (np.int16, 16), torch.float32: (np.int32, 32),
          torch.float64: (np.int64, 64)}
_TORCH_WORDS = {16: torch.int16, 32: torch.int32, 64: torch.int64}


def keep_words(shape: torch.Size, dtype: torch.dtype, p: float) -> Tensor:
    """Random words, all ones (keep) with probability 1 - p and all zeros (drop) with probability p.

    Args:
        shape: shape of the mask.
        dtype: float type whose bits the words are for; its width decides the integers' width.
        p: drop probability in [0, 1), met to 2^-15 for 16-bit floats and to 2^-31 or better for wider ones.

    Returns:
        CPU integers of `shape`, to be combined by `keep_bits`.
    """
    numpy_word, bits = _WORDS[dtype]
    seed = int(torch.randint(2**62, (1,)))
    num_words = shape.numel()
    num_draws = -(-num_words * bits // 64)
    draws = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64 - 1, num_draws, np.uint64, endpoint=True)
    words = torch.from_numpy(draws.view(numpy_word)[:num_words])
    # In [-2^(bits-2), 2^(bits-2)) after the shift, so that subtracting the p-quantile cannot overflow; the sign then says
    # "dropped" (negative), and an arithmetic shift by all bits but one spreads it over the word.
    half = 2 ** (bits - 2)
    words.bitwise_right_shift_(1).sub_(round(p * 2 * half) - half).bitwise_right_shift_(bits - 1)
    return words.bitwise_not_().view(shape)


def keep_bits(x: Tensor, words: Tensor, in_place: bool = False) -> Tensor:
    """x where the word is all ones, +0.0 where it is all zeros."""
    bits = x.view(_TORCH_WORDS[x.element_size() * 8])
    return (bits.bitwise_and_(words) if in_place else bits & words).view(x.dtype)


class _MaskedScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        words = keep_words(x.shape, x.dtype, p)
        ctx.save_for_backward(words)
        ctx.scale = 1 / (1 - p)
        return keep_bits(x.contiguous(), words).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (words,) = ctx.saved_tensors
        return keep_bits(grad.contiguous(), words).mul_(ctx.scale), None


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout of `x`, of any shape, with drop probability `p`; the identity unless `training`."""
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.dtype not in _WORDS or not 0 < p < 1:
        return nn.functional.dropout(x, p, training)
    return _MaskedScale.apply(x, p)


class Dropout(nn.Dropout):
    """`nn.Dropout` with the fast masks; an `nn.Dropout` still, for code that asks for one."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)


def replace_dropout(model: nn.Module) -> int:
    """Put `Dropout` in the place of every plain `nn.Dropout` inside `model`; returns how many."""
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
             if type(child) is nn.Dropout]
    for parent, name, child in found:
        setattr(parent, name, Dropout(child.p).train(child.training))
    return len(found)
