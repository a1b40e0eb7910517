"""Skip this on first reading: dropout (Srivastava et al. 2014), with masks that a CPU draws fast. A GPU runs PyTorch's.

    y = x * keep / (1 - p),   keep ~ Bernoulli(1 - p) for every element

PyTorch draws a CPU's masks one element at a time, which takes a quarter of a BERT step. Here numpy's SFC64 draws one random
integer for each element, as wide as the float. Integer arithmetic turns it into a word of all ones or all zeros, which is
ANDed with the float's bits. For bf16 that is about ten times as fast.

The seed of SFC64 comes from PyTorch's CPU generator. So `torch.manual_seed` decides the masks as before, and a saved generator
state draws them again (resumed runs, gradient checkpointing). On a GPU and under torch.compile PyTorch's own dropout is used.
Used by: attention.py; bert/model.py and train_llama.py, through `replace_dropout`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

# float type -> integer of the same width
_WORDS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def keep_words(shape: torch.Size, dtype: torch.dtype, p: float) -> Tensor:
    """Random integers, as wide as floats of `dtype`: all ones (keep) with probability 1 - p, all zeros (drop) with p.

    p is in [0, 1). It is met to 2^-15 for 16-bit floats, and to 2^-31 or better for wider ones.
    """
    seed = int(torch.randint(2**62, (1,)))
    bits = torch.iinfo(_WORDS[dtype]).bits
    num_draws = shape.numel() * bits // 64 + 1
    draws = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64 - 1, num_draws, np.uint64, endpoint=True)
    words = torch.from_numpy(draws.view(np.int64)).view(_WORDS[dtype])[:shape.numel()]
    # The shift by 1 brings a word into [-2^(bits-2), 2^(bits-2)), so subtracting the p-quantile cannot overflow. A negative
    # word is then a dropped one, and an arithmetic shift by all bits but one copies the sign into every bit.
    half = 2 ** (bits - 2)
    words.bitwise_right_shift_(1).sub_(round(p * 2 * half) - half).bitwise_right_shift_(bits - 1)
    return words.bitwise_not_().view(shape)


def keep_bits(x: Tensor, words: Tensor, in_place: bool = False) -> Tensor:
    """x where the word is all ones, +0.0 where it is all zeros."""
    bits = x.view(words.dtype)
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
    """`nn.Dropout` with the fast masks. It is still an `nn.Dropout`, for code that asks for one."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)


def replace_dropout(model: nn.Module) -> int:
    """Replace every plain `nn.Dropout` inside `model` by `Dropout`; returns how many there were."""
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
             if type(child) is nn.Dropout]
    for parent, name, child in found:
        setattr(parent, name, Dropout(child.p).train(child.training))
    return len(found)
