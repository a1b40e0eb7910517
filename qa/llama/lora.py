"""LoRA from scratch: freeze a LLaMA and train a low-rank addition to some of its linear layers.

    y = W x + (alpha / r) B A dropout(x)        Hu et al. 2021, "LoRA", section 4.1, equation 3
    y = W x + (alpha / sqrt(r)) B A dropout(x)  Kalajdzievski 2023, "rsLoRA": the addition keeps its size as r grows

            x [T, in]
       +-------+---------+
       |                 |
    W, frozen         dropout           W      [out, in]  the pretrained weight, in whatever type it is held
       |                 |
       |         A [r, in], trained     A      random: rows that begin equal would stay equal, and r rows
       |                 |                     would learn no more than one
       |                 |
       |         B [out, r], trained    B      zero, so that training starts at exactly the base model
       +-------+---------+
               |  +
            y [T, out]

`model.py` gives the base model, `train_llama.py` calls `inject_lora` before it builds the optimizer, `targets.py` says which
layers and how strong, `adapter.py` stores the result as a PEFT folder.

Letters: T tokens, in / out features of a linear layer, r rank.
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from qa.errors import UserError
from qa.llama.targets import LoraSpec, find_targets


class LoRALinear(nn.Module):
    """One linear layer with its addition.

    A and B are stored in fp32 (fp64 over an fp64 base) whatever W's type is: half precision would lose AdamW's small steps,
    and GradScaler refuses gradients in fp16. Under autocast both are computed in autocast's type, as every linear layer is.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        assert type(base) is nn.Linear, f"LoRA over {type(base).__name__}: a packed or already wrapped layer"
        stored = torch.promote_types(base.weight.dtype, torch.float32)
        self.base, self.scale = base, scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        # Built as peft builds them, on the CPU and in this order, so that one seed gives both the same A.
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, dtype=torch.float32)  # weight [r, in]
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, dtype=torch.float32)  # weight [out, r]
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.lora_A.to(base.weight.device, stored)
        self.lora_B.to(base.weight.device, stored)
        self.unmerged_weight: torch.Tensor | None = None  # the base's own weight, while B A is merged into it

    @property
    def merged(self) -> bool:
        return self.unmerged_weight is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        y = self.base(x)
        if self.merged:
            assert not self.training, "a merged layer cannot be trained: unmerge first"
            return y
        x = self.dropout(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.weight.dtype)
        low = self.lora_A(x) * self.scale  # [..., r]: scaled where there is least to multiply
        return (y + self.lora_B(low)).to(y.dtype)  # without autocast: a bf16 y + the fp32 addition, rounded once

    @torch.no_grad()
    def merge(self) -> None:
        """W <- W + scale B A, in fp32 and then rounded to W's type. Does nothing when merged already."""
        if self.merged:
            return
        weight, wide = self.base.weight, self.lora_A.weight.dtype
        delta = self.scale * (self.lora_B.weight @ self.lora_A.weight)  # [out, in]
        self.unmerged_weight = weight.data
        weight.data = (weight.data.to(wide) + delta).to(weight.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the kept weight back. Subtracting B A again would not restore its last bits."""
        if self.merged:
            self.base.weight.data = self.unmerged_weight.to(self.base.weight.device)
            self.unmerged_weight = None


def inject_lora(model: nn.Module, spec: LoraSpec, *, every_name: bool = True, source: str = "--target") -> list[str]:
    """Freeze the whole model and give every target layer its trainable A and B; returns the paths of these layers.

    every_name, source: see `find_targets`. every_name=False is peft's rule: one match is enough.
    """
    assert not lora_layers(model), "LoRA is already injected"
    targets = find_targets(model, spec, every_name, source)
    model.requires_grad_(False)
    for name, base in targets.items():
        if (rank := spec.layer_rank(name)) > max(base.in_features, base.out_features):
            raise UserError(f"--rank (r in a PEFT adapter) is {rank}, but {name} has only {base.in_features} inputs and "
                            f"{base.out_features} outputs; give a rank that is at most as large")
        layer = LoRALinear(base, spec.layer_rank(name), spec.layer_scale(name), spec.dropout)
        layer.train(base.training)
        model.set_submodule(name, layer)
    return list(targets)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def merge(model: nn.Module) -> None:
    """Fold every addition into its base weight, for the speed of the base model. Never part of eval()."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`, to the bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """{"<path>.lora_A.weight": [r, in], "<path>.lora_B.weight": [out, r], ...}: the parameters themselves."""
    return {f"{name}.{part}.weight": getattr(layer, part).weight.detach()
            for name, layer in lora_layers(model).items() for part in ("lora_A", "lora_B")}


@torch.no_grad()
def load_lora_state_dict(model: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Copy tensors into the injected layers. Each key must have its layer, and each layer its keys."""
    places = lora_state_dict(model)
    for problem, keys in (("unmatched", tensors.keys() - places.keys()), ("missing", places.keys() - tensors.keys())):
        if keys:
            raise UserError(f"{source} does not fit the model: {len(keys)} {problem} keys, such as {min(keys)}; "
                            f"expected {len(places)} for these target layers; use the base that it was trained on")
    for key, place in places.items():
        if place.shape != tensors[key].shape:
            raise UserError(f"{source} does not fit the model: {key} has shape {list(tensors[key].shape)}, "
                            f"expected {list(place.shape)}; use the base and the rank that it was trained with")
    for key, place in places.items():
        place.copy_(tensors[key])


def describe_trainable(model: nn.Module) -> str:
    """What trains, as a table. Parameters whose names differ in the block's number only share a line.

    model.layers.*.self_attn.q_proj.lora_A.weight     [16, 576]  x 30          276,480
    """
    groups: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            label = f"{re.sub(r'[.][0-9]+[.]', '.*.', name):<46} {str(list(parameter.shape)):>12}"
            groups.setdefault(label, []).append(parameter.numel())
    lines = [f"{label}  x {len(counts):<4} {sum(counts):>14,}" for label, counts in groups.items()]
    trained = sum(sum(counts) for counts in groups.values())
    total = sum(p.numel() for p in model.parameters())
    return "\n".join([*lines, f"trains {trained:,} of {total:,} parameters ({trained / total:.2%})"])
