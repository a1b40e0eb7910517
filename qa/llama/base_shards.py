"""A base that no rank holds whole: every rank reads its rows of each weight from the safetensors. For --shard.

    empty_llama   the model without its weights: on the device "meta" a tensor has a shape and a type, but no memory
    fill_shards   cuts it over the ranks (training/sharding.py), and reads what this rank has

A tied language-model head becomes a matrix of its own, with the same numbers, because the embeddings and the head are gathered
at different times. Used by: model.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qa.training.distributed import Runtime
from qa.training.sharding import shard
from qa.weights import weight_files


def empty_llama(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    return model.requires_grad_(False).eval()


@torch.no_grad()
def fill_shards(model: PreTrainedModel, folder: Path, runtime: Runtime) -> dict[str, set[str]]:
    """Returns what transformers' loading reports: the keys that the files lack, and those that the model does not know."""
    shard(model.model, runtime)
    shard(model.lm_head, runtime)  # apart: in training and in both decoders it is called by itself
    model.to_empty(device=runtime.device)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(runtime.device)  # computed, not read
    where = {key: (path, key) for path in weight_files(folder) for key in safe_open(path, "pt").keys()}
    if model.config.tie_word_embeddings and "model.embed_tokens.weight" in where:
        where["lm_head.weight"] = where["model.embed_tokens.weight"]
    parameters = dict(model.named_parameters())
    for name in where.keys() & parameters.keys():
        _read_rows(parameters[name], *where[name], runtime)
    return {"missing_keys": parameters.keys() - where.keys(), "unexpected_keys": {
        key for key in where.keys() - parameters.keys() if not key.endswith("rotary_emb.inv_freq")}}  # older files have it


def _read_rows(parameter: nn.Parameter, path: Path, key: str, runtime: Runtime) -> None:
    """This rank's rows of a weight, as `fully_shard` cuts it: by `chunk`. With 10 rows and 4 ranks: 3, 3, 3, 1."""
    with safe_open(path, "pt") as file:  # for one weight at a time: what was read counts as this process's memory until then
        stored = file.get_tensor(key)  # of the disk, not yet in memory
        if stored.shape != parameter.shape:
            raise ValueError(f"{key} has the shape {list(stored.shape)}, expected {list(parameter.shape)}")
        for rows in stored.chunk(runtime.num_ranks)[runtime.rank:][:1]:  # none, if there are fewer rows than ranks
            parameter.to_local().copy_(rows)
