"""Which base weights are these? An adapter fits the ones that it was trained on, and no others.

Used by: adapter.py, and train_llama.py for --resume.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import nn

from qa.errors import UserError
from qa.llama.lora import lora_layers
from qa.training.sharding import whole


def base_fingerprint(model: nn.Module) -> dict[str, str]:
    """{"dtype", "bytes", "signs"} of the base, whether LoRA is injected, trained, merged or absent.

    "bytes" is the SHA-256 of names, shapes and all bytes; it changes with the type in which the base is held. "signs" is the
    same over the sign of each number. A run in bf16 may be evaluated in fp32: no rounding changes a sign, while any other
    training of the model flips some. A 1B model takes a few seconds.
    """
    layers = lora_layers(model).values()
    added = {id(p) for layer in layers for p in (layer.lora_A.weight, layer.lora_B.weight)}
    unmerged = {id(layer.base.weight): layer.unmerged_weight for layer in layers if layer.merged}
    tied_head = "lm_head.weight" if model.config.tie_word_embeddings else None  # --shard makes a copy of the embeddings of it
    by_bytes, by_signs, dtypes = hashlib.sha256(), hashlib.sha256(), set()
    for name, parameter in model.named_parameters():
        if id(parameter) in added or name == tied_head:
            continue
        weight = whole(unmerged.get(id(parameter), parameter)).detach().cpu().contiguous()
        label = f"{name.replace('.base.', '.')} {list(weight.shape)}\n".encode()
        flat = weight.flatten()
        signs = np.packbits(flat.signbit().numpy())  # 8 signs a byte
        for digest, content in ((by_bytes, flat.view(torch.uint8).numpy()), (by_signs, signs)):
            digest.update(label)
            digest.update(content)
        dtypes.add(str(flat.dtype).removeprefix("torch."))
    return {"dtype": "+".join(sorted(dtypes)), "bytes": by_bytes.hexdigest(), "signs": by_signs.hexdigest()}


def is_same_base(one: dict[str, str], other: dict[str, str]) -> bool:
    key = "bytes" if one["dtype"] == other["dtype"] else "signs"
    return one[key] == other[key]


def check_base(trained_on: dict[str, str], found: dict[str, str], name: str) -> None:
    """For --resume: the base must be the one that the run was begun with."""
    if not is_same_base(trained_on, found):
        raise UserError(f"--resume: the weights of {name} are not those that the run was begun with")
