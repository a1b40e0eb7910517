"""The base model, LLaMA or one like it, with its tokenizer, from a folder or a .gguf file; and the way back.

`qa/weights.py` has turned the value of --model into a path. `train_llama.py` and `qa/reader.py` load it here, and hand the
model to `lora.py` or `adapter.py`. We refuse, in one line, all that is not what it claims to be: another family (qa/families.py
has the known ones), missing or packed weights, a tokenizer without offsets; exactness.py tries the model out. Weights in a
.gguf file are unpacked, because LoRA adds to ordinary nn.Linear layers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from qa.errors import UserError
from qa.files import make_readable
from qa.llama.base_shards import empty_llama, fill_shards
from qa.llama.exactness import check_exactness, sliding_window
from qa.llama.gguf import check_gguf, parsed_once, set_special_tokens
from qa.llama.lora import lora_layers, merge, unmerge
from qa.training.distributed import Runtime
from qa.weights import expect_reader, load_tokenizer, read_config


def load_llama(path: Path, dtype: torch.dtype = torch.float32,
               shared_by: Runtime | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, its weights held in `dtype`, in eval mode on the CPU, and the tokenizer stored with it.

    shared_by: the ranks, two or more, that hold a part of it each (--shard), on their devices.

    Raises UserError, naming `path`, if this is no LLaMA, or its weights or tokenizer are not those of one.
    """
    with parsed_once(path):
        model = _load_model(path, dtype, shared_by)
        check_exactness(model, path)
        tokenizer = load_llama_tokenizer(path)
    tokenizer.num_embeddings = model.get_input_embeddings().num_embeddings  # for end_tokens.py and prompt.py
    return model, tokenizer


def _load_model(path: Path, dtype: torch.dtype, shared_by: Runtime | None) -> PreTrainedModel:
    if path.is_file():
        if shared_by is not None:
            raise UserError(f"--shard: {path} is a .gguf file; give a folder, as evaluate.py --merge-into makes one of it")
        check_gguf(path)
        folder, how = path.parent, {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    else:
        check_base_folder(path)
        folder, how = path, {"use_safetensors": True, "ignore_mismatched_sizes": True}  # they are reported below
    try:
        if shared_by is not None:
            model = empty_llama(folder, dtype)
        else:
            model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa",
                                                                 output_loading_info=True, **how)
        if dtype == torch.float64:
            _keep_norms_in_fp64(model)
        if shared_by is not None:
            report = fill_shards(model, folder, shared_by)
    except Exception as error:  # of transformers, safetensors, torch, for whatever is wrong with the files
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} cannot be loaded as a LLaMA: {reason}") from error
    misshapen = {key for key, *_ in report.get("mismatched_keys", ())}
    for problem, keys in (("has misshapen", misshapen), ("lacks", report["missing_keys"]),
                          ("has unknown", report["unexpected_keys"])):
        if keys:
            raise UserError(f"{path} {problem} weights ({len(keys)}, such as {min(keys)}); expected those of a complete "
                            f"{type(model).__name__} with its language-model head")
    _forget_packing(model)
    return model


def load_llama_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(path)
    if path.is_file():
        set_special_tokens(tokenizer, path)
    return tokenizer


def context_length(model: PreTrainedModel, max_length: int | None) -> int:
    """Resolve `--max-length`: None is the model's context, at most 4,096 tokens, since few passages need more."""
    context = model.config.max_position_embeddings
    if max_length and max_length > context:
        raise UserError(f"--max-length {max_length}: the model's context has {context} tokens; give at most that")
    length, window = max_length or min(context, 4096), sliding_window(model.config)
    if window and length > window:
        raise UserError(f"--max-length {length}: the model's sliding window has {window} tokens, but here every token sees the "
                        "whole passage; give at most that")
    return length


def check_base_folder(folder: Path) -> None:
    """Its config.json says that it is a LLaMA, or one like it, with ordinary weights."""
    expect_reader(folder, "llama")
    if packing := read_config(folder).get("quantization_config"):
        method = packing.get("quant_method", "an unnamed method")
        raise UserError(f"{folder} holds weights packed by {method}; give the model without it, or a .gguf")


def _forget_packing(model: PreTrainedModel) -> None:
    """An unpacked .gguf is an ordinary model, but transformers saves none whose config still says "quantized"."""
    packed = [name for name, m in model.named_modules() if name.endswith("_proj") and type(m) is not nn.Linear]
    assert not packed, f"LoRA needs nn.Linear layers: {packed}"
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def _keep_norms_in_fp64(model: PreTrainedModel) -> None:
    """LlamaRMSNorm and its like compute in fp32 whatever they are given; --precision fp64 is there to be exact."""
    for name, norm in list(model.named_modules()):
        if type(norm).__name__.endswith("RMSNorm"):
            exact = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
            exact.weight = norm.weight
            model.set_submodule(name, exact)


def export_merged(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save W + scale B A, in W's type, as a plain transformers model; `model` itself is unchanged after."""
    layers = lora_layers(model)
    was_merged = any(layer.merged for layer in layers.values())
    merge(model)
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer.base)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        make_readable(folder)
    except OSError as error:
        raise UserError(f"--merge-into {folder}: cannot be written ({error.strerror})") from None
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        if not was_merged:
            unmerge(model)
