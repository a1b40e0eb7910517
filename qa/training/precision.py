"""Number formats of a run: what autocast computes in, and whether gradients are scaled.

    fp32   no autocast
    bf16   autocast to bfloat16: the range of fp32, so no scaling
    fp16   autocast to half, and a GradScaler: small gradients would vanish (Micikevicius et al. 2018, arXiv:1710.03740)
    fp64   the whole model in double, for tests of exactness

Trainable parameters are fp32 in all but the last. Used by both train scripts and predict.py; `at_least_fp32` by losses and
decoders.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from qa.errors import UserError

AUTOCAST_DTYPES = {"fp32": None, "fp64": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    name: str  # fp32, bf16, fp16 or fp64: never "auto"
    device_type: str

    @property
    def parameter_dtype(self) -> torch.dtype:
        return torch.float64 if self.name == "fp64" else torch.float32

    def base_dtype(self, name: str) -> torch.dtype:
        """Resolve `--base-dtype`, the type in which LLaMA's frozen weights are held."""
        if self.name == "fp64":
            return torch.float64
        if name == "auto":
            half = AUTOCAST_DTYPES[self.name]
            return half if half is not None and self.device_type == "cuda" else torch.float32
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]

    def autocast(self) -> contextlib.AbstractContextManager:
        """A fresh autocast context for one forward pass; a no-op in fp32 and fp64."""
        dtype = AUTOCAST_DTYPES[self.name]
        if dtype is None:
            return contextlib.nullcontext()
        return torch.amp.autocast(self.device_type, dtype=dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales in fp16; in every other precision all its methods pass through."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def choose_precision(name: str, device: torch.device) -> Precision:
    """Resolve `--precision`. `auto` takes what the hardware computes natively, never what it emulates."""
    if name == "auto":
        name = _native_half(device)
    if name not in AUTOCAST_DTYPES:
        raise UserError(f"--precision {name}: expected one of auto, {', '.join(AUTOCAST_DTYPES)}")
    return Precision(name, device.type)


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision raised to fp32; fp64 stays. Losses and decoding compute in this."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _native_half(device: torch.device) -> str:
    if device.type == "cuda":  # is_bf16_supported() alone is true by emulation on older cards
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("amx_tile"):
            return "bf16"
    return "fp32"
