"""Number formats of a run: what autocast computes in, and whether gradients are scaled.

    fp32   no autocast
    bf16   autocast to bfloat16: the range of fp32, so no scaling
    fp16   autocast to half, and a GradScaler: it multiplies the loss by a large number, so that small gradients do not
           become 0 in fp16, and divides the gradients by it again (Micikevicius et al. 2018, arXiv:1710.03740)
    fp64   the whole model in double, for tests of exactness

`--precision auto` takes bf16 on a GPU that computes it natively, else fp16. On a CPU it measures a matrix product of the
model's shape, and takes bf16 if that is at least MIN_SPEEDUP times as fast as fp32. The CPU's list of instructions does not
tell: an AMD Zen 4 and an Intel without AMX both list avx512_bf16, but bf16 was 2.3 times as fast as fp32 on the first, and 0.6
times on the second.

Trainable parameters are fp32, except in fp64. Used by both train scripts, both readers and qa/reader.py; `at_least_fp32`
by losses and decoders.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import nn

from qa.training.distributed import Runtime, gather_objects

AUTOCAST_DTYPES = {"fp32": None, "fp64": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_SPEEDUP = 1.3  # less is not worth bf16's rounding


@dataclass(frozen=True)
class Precision:
    name: str  # fp32, bf16, fp16 or fp64: never "auto"
    device_type: str
    reason: str = field(default="", compare=False)  # why this one, for the terminal and the records

    @property
    def parameter_dtype(self) -> torch.dtype:
        return torch.float64 if self.name == "fp64" else torch.float32

    @property
    def is_half(self) -> bool:
        return self.name in ("bf16", "fp16")

    def autocast(self) -> torch.amp.autocast:
        """A fresh autocast context for one forward pass; a no-op in fp32 and fp64."""
        dtype = AUTOCAST_DTYPES[self.name]
        return torch.amp.autocast(self.device_type, dtype, enabled=dtype is not None)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """A scaler that scales in fp16; in every other precision its methods change nothing."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def time_products(num_tokens: int, hidden_size: int, intermediate_size: int) -> tuple[float, float]:
    """Seconds of a product of a feed-forward layer, [tokens, hidden] x [hidden, intermediate], in fp32 and in bf16.

    The best of five tries, of three if they take long: the first is slow. On one core: waiting for other threads is noise.
    """
    operands = [(torch.ones(num_tokens, hidden_size, dtype=dtype), torch.ones(intermediate_size, hidden_size, dtype=dtype))
                for dtype in (torch.float32, torch.bfloat16)]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds: list[float] = []  # in fp32, bf16, fp32, bf16, ...
    while len(seconds) < 6 or len(seconds) < 10 and sum(seconds) < 0.1:
        for tokens, weight in operands:
            begin = time.perf_counter()
            nn.functional.linear(tokens, weight)
            seconds.append(time.perf_counter() - begin)
    torch.set_num_threads(num_threads)
    return min(seconds[::2]), min(seconds[1::2])


def choose_precision(name: str, runtime: Runtime, hidden_size: int, intermediate_size: int) -> Precision:
    """Resolve `--precision`; every rank gets the choice of rank 0. The sizes are those of the model's config."""
    if name != "auto":
        return Precision(name, runtime.device.type, f"{name}: asked for by --precision")
    if runtime.device.type == "cuda":
        name = _native_half()
        return Precision(name, "cuda", f"{name}: this GPU {'computes' if name == 'bf16' else 'only emulates'} bf16")
    # All ranks measure at the same time, because they will also train at the same time; their results may differ.
    num_tokens, speedup = gather_objects(_bf16_speedup(hidden_size, intermediate_size), runtime)[0]
    name = "bf16" if speedup >= MIN_SPEEDUP else "fp32"
    return Precision(name, "cpu", f"{name}: a product [{num_tokens}, {hidden_size}] x [{hidden_size}, {intermediate_size}] is "
                                  f"{speedup:.2f} times as fast in bf16 as in fp32 here")


def base_dtype(name: str, precision: str, device: torch.device) -> torch.dtype:
    """Resolve `--base-dtype`, the type of LLaMA's frozen weights. `precision` may be "auto": no model is loaded yet."""
    if precision == "fp64":
        return torch.float64
    if name == "auto":
        name = "fp32" if device.type == "cpu" else _native_half() if precision == "auto" else precision
    return AUTOCAST_DTYPES[name] or torch.float32


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """fp16 and bf16 become fp32; fp64 stays fp64. Losses and decoding compute in this type."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _native_half() -> str:
    """bf16 if this GPU computes it, else fp16. Plain is_bf16_supported() is true on older GPUs too: they emulate it."""
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _bf16_speedup(hidden_size: int, intermediate_size: int) -> tuple[int, float]:
    """The number of tokens of the product that was measured, and how many times as fast it was in bf16 as in fp32.

    Fewer than 64 would measure how fast memory is. More, until the slower type takes 4 ms: a clock is not exact.
    """
    for num_tokens in (64, 128, 256, 512, 1024, 2048, 4096):
        fp32, bf16 = time_products(num_tokens, hidden_size, intermediate_size)
        if max(fp32, bf16) > 0.004:
            break
    return num_tokens, fp32 / bf16
