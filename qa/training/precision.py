"""Number formats of a run: what autocast computes in, and whether gradients are scaled.

    fp32   no autocast
    bf16   autocast to bfloat16: the range of fp32, so no scaling
    fp16   autocast to half, and a GradScaler: small gradients would vanish (Micikevicius et al. 2018, arXiv:1710.03740)
    fp64   the whole model in double, for tests of exactness

`--precision auto` takes what a GPU computes natively, never what it emulates. On a CPU it takes bf16 only where a product of
the model's shape is at least MIN_SPEEDUP times as fast as in fp32. That is measured, because the CPU's list of instructions
does not tell: with avx512_bf16, AMD's Zen 4 multiplies about 2.3 times as fast in bf16, an Intel without AMX 0.6 times.

Trainable parameters are fp32 in all but fp64. Used by both train scripts, both readers and qa/reader.py; `at_least_fp32` by
losses and decoders.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field

import torch
from torch import nn

from qa.errors import UserError
from qa.training.distributed import Runtime, gather_objects

AUTOCAST_DTYPES = {"fp32": None, "fp64": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_SPEEDUP = 1.3  # below it bf16's rounding buys too little


@dataclass(frozen=True)
class Precision:
    name: str  # fp32, bf16, fp16 or fp64: never "auto"
    device_type: str
    reason: str = field(default="", compare=False)  # why this one, for the terminal and the records

    @property
    def parameter_dtype(self) -> torch.dtype:
        return torch.float64 if self.name == "fp64" else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager:
        """A fresh autocast context for one forward pass; a no-op in fp32 and fp64."""
        dtype = AUTOCAST_DTYPES[self.name]
        if dtype is None:
            return contextlib.nullcontext()
        return torch.amp.autocast(self.device_type, dtype=dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales in fp16; in every other precision all its methods pass through."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def time_products(num_tokens: int, hidden_size: int, intermediate_size: int) -> tuple[float, float]:
    """Seconds of a product of a feed-forward layer, [tokens, hidden] x [hidden, intermediate], in fp32 and in bf16.

    On one core, because waiting for other threads is noise. The best of five tries, both types in turn; of fewer if a try
    takes long, as in a bf16 that is emulated.
    """
    operands = [(torch.ones(num_tokens, hidden_size, dtype=dtype), torch.ones(intermediate_size, hidden_size, dtype=dtype))
                for dtype in (torch.float32, torch.bfloat16)]
    best, begin, num_threads = [math.inf, math.inf], time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            for index, (tokens, weight) in enumerate(operands):
                since = time.perf_counter()
                nn.functional.linear(tokens, weight)
                best[index] = min(best[index], time.perf_counter() - since)
            if time.perf_counter() - begin > 0.1:
                break
    finally:
        torch.set_num_threads(num_threads)
    return best[0], best[1]


def choose_precision(name: str, runtime: Runtime, hidden_size: int, intermediate_size: int) -> Precision:
    """Resolve `--precision`; every rank gets the choice of rank 0.

    Args:
        hidden_size, intermediate_size: of the model, as in its config: the shape of the product that `auto` tries on a CPU.
    """
    if name != "auto":
        if name not in AUTOCAST_DTYPES:
            raise UserError(f"--precision {name}: expected one of auto, {', '.join(AUTOCAST_DTYPES)}")
        return Precision(name, runtime.device.type, f"{name}: asked for by --precision")
    if runtime.device.type == "cuda":
        name = _native_half()
        return Precision(name, "cuda", f"{name}: this GPU {'computes' if name == 'bf16' else 'only emulates'} bf16")
    # All ranks try at the same time, as they will compute; their results may differ.
    num_tokens, speedup = gather_objects(_bf16_speedup(hidden_size, intermediate_size), runtime)[0]
    name = "bf16" if speedup >= MIN_SPEEDUP else "fp32"
    return Precision(name, "cpu", f"{name}: a product [{num_tokens}, {hidden_size}] x [{hidden_size}, {intermediate_size}] is "
                                  f"{speedup:.2f} times as fast in bf16 as in fp32 here")


def base_dtype(name: str, precision: str, device: torch.device) -> torch.dtype:
    """Resolve `--base-dtype`, the type in which LLaMA's frozen weights are held.

    Args:
        precision: `--precision`, which may still be "auto": the model's shape is not known before its weights are loaded.
    """
    if precision == "fp64":
        return torch.float64
    if name == "auto":
        half = AUTOCAST_DTYPES[_native_half() if precision == "auto" else precision] if device.type == "cuda" else None
        return half or torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision raised to fp32; fp64 stays. Losses and decoding compute in this."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _native_half() -> str:
    """The half-precision type of this GPU; is_bf16_supported() alone is true by emulation on older ones."""
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _bf16_speedup(hidden_size: int, intermediate_size: int) -> tuple[int, float]:
    """How many times as fast this CPU multiplies in bf16 as in fp32; returns the product's number of tokens, and that.

    Tokens are doubled until the slower type takes some milliseconds, well above the noise of a clock. With fewer than 64 the
    products would wait for the weights to come from memory.
    """
    num_tokens = 64
    while True:
        fp32, bf16 = time_products(num_tokens, hidden_size, intermediate_size)
        if max(fp32, bf16) > 0.004 or num_tokens == 4096:
            return num_tokens, fp32 / bf16
        num_tokens *= 2
