"""Which layers of a LLaMA get LoRA, and how strong it is in each.

`train_llama.py` builds a `LoraSpec` from its flags, `adapter.py` reads one from adapter_config.json; `lora.py` injects what
`find_targets` finds. What a target names and what a rank pattern matches follows peft 0.21, so that one folder means the same
in both (`peft/tuners/tuners_utils.py: check_target_module_exists`, `peft/utils/other.py: get_pattern_key`).

A path is a module's name within the model, "model.layers.7.self_attn.q_proj".
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from torch import nn

from qa.errors import UserError


@dataclass(frozen=True)
class LoraSpec:
    """Everything that decides the function of an adapter, apart from its tensors.

    targets, exclude: a tuple of layer names ("q_proj" is every layer whose path ends in ".q_proj"); or a string, a regular
        expression for the whole path. targets may be "all-linear": all but the output head.
    blocks: only in the blocks with these numbers; None is all.
    rank_pattern, alpha_pattern: {regular expression for a path's end: rank or alpha there}; the first wins.
    """

    targets: tuple[str, ...] | str = ("q_proj", "k_proj", "v_proj", "o_proj")
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    exclude: tuple[str, ...] | str = ()
    blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for pattern in (self.targets, self.exclude, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern if isinstance(pattern, str) else "")
            except re.error as error:
                raise UserError(f"adapter_config.json: {pattern!r} is no regular expression ({error}); correct it") from None

    def describe(self) -> str:
        targets = self.targets if isinstance(self.targets, str) else ", ".join(self.targets)
        scale = "alpha / sqrt(r)" if self.rslora else "alpha / r"
        return f"LoRA on {targets}, r {self.rank}, alpha {self.alpha:g} (scale {scale}), dropout {self.dropout:g}"

    def layer_rank(self, name: str) -> int:
        return _first_match(self.rank_pattern, name, self.rank)

    def layer_scale(self, name: str) -> float:
        alpha, rank = _first_match(self.alpha_pattern, name, self.alpha), self.layer_rank(name)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _first_match(patterns: dict, name: str, default):
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), default)


def targets_from_flag(text: str) -> tuple[str, ...] | str:
    """The value of --target: "q,k,v,o", "q_proj,gate_proj" or "all-linear". LLaMA's names end in _proj."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all-linear"]:
        return "all-linear"
    return tuple(name if "_" in name else f"{name}_proj" for name in names)


def find_targets(model: nn.Module, spec: LoraSpec, every_name: bool, source: str) -> dict[str, nn.Linear]:
    """{path: layer} of the layers that `spec` names, in the model's order.

    every_name: each listed name must match a layer; else a misspelt one among good ones is left out in silence.
    Raises UserError, which names the flag or file `source`, if there is no such layer, or one that is not linear, or a
    language-model head whose weight is the embedding table (adding to it would change the embeddings as well).
    """
    head, modules = model.get_output_embeddings(), dict(model.named_modules())
    linears = {name: m for name, m in modules.items() if type(m) is nn.Linear and m is not head}
    hint = "name some of " + ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linears))
    if str(spec.targets).lower() == "all-linear":
        named = linears
    else:
        named = {name: m for name, m in modules.items() if name and _matches(spec.targets, name)}
    found = {name: m for name, m in named.items() if not _matches(spec.exclude, name) and _in_blocks(spec, name)}
    for name, layer in found.items():
        if type(layer) is not nn.Linear:
            raise UserError(f"{source} names {name}, which is a {type(layer).__name__} and not a linear layer; {hint}")
        if layer is head and layer.weight is model.get_input_embeddings().weight:
            raise UserError(f"{source} names {name}, which shares its weight with the embeddings here; {hint}")
    listed = spec.targets if every_name and isinstance(spec.targets, tuple) else ()
    unmatched = [name for name in listed if not any(_matches((name,), path) for path in named)]
    if unmatched or not found:
        shown = spec.targets if isinstance(spec.targets, str) else ",".join(unmatched or spec.targets)
        raise UserError(f"{source} {shown!r} matches no layer of the model; {hint}")
    return found


def _matches(pattern: tuple[str, ...] | str, name: str) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in pattern)


def _in_blocks(spec: LoraSpec, name: str) -> bool:
    """Whether the path's first number, 7 in model.layers.7.mlp.up_proj, is one of `spec.blocks`."""
    number = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return spec.blocks is None or number is not None and int(number[1]) in spec.blocks
