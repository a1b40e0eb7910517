"""The base model, any LlamaForCausalLM with its tokenizer, from a folder or a .gguf file; and the way back.

`qa/weights.py` has turned the value of --model into a path; `train_llama.py` and `evaluate.py`
load it here and hand the model to `lora.py` or `adapter.py`. Whatever would make it something else than
the LLaMA it claims to be is refused here, in one line: another family, missing or packed weights, a
tokenizer that cannot say which characters a token stands for.

A .gguf file (llama.cpp's format) holds weights in blocks of a few bits each. They are unpacked when loading,
because LoRA adds to ordinary nn.Linear layers. The file begins with
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)

    "GGUF"  version u32  number of tensors u64  number of pairs u64  then pairs of key, type u32, value

of which only general.architecture and the special tokens' ids are read here; transformers reads the rest.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import BinaryIO

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qa.errors import UserError
from qa.files import make_readable
from qa.llama.lora import lora_layers, merge, unmerge
from qa.weights import expect_family


def load_llama(path: Path, dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model, its weights held in `dtype`, in eval mode on the CPU, and the tokenizer stored with it.

    Raises UserError, naming `path`, if this is no LLaMA, if its weights are not exactly those of one, or if
    the tokenizer has no offsets.
    """
    if path.is_file():
        check_gguf(path)
        folder, where, how = path.parent, {"gguf_file": path.name}, {}
        if hasattr(transformers, "GgufConfig"):  # before it, unpacking was all that transformers could do
            how = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    else:
        check_base_folder(path)
        folder, where, how = path, {}, {"use_safetensors": True}
    try:
        model, report = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa",
                                                         output_loading_info=True, **where, **how)
    except (ImportError, OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} cannot be loaded as a LLaMA: {_first_line(error)}") from error
    for problem, keys in (("lacks", report["missing_keys"]), ("has unknown", report["unexpected_keys"])):
        if keys:
            raise UserError(
                f"{path} {problem} weights ({len(keys)}, such as {min(keys)}); expected those of a complete "
                "LlamaForCausalLM with its language-model head"
            )
    _forget_packing(model)
    if dtype == torch.float64:
        _keep_norms_in_fp64(model)
    return model, load_tokenizer(path, folder, **where)


def context_length(model: LlamaForCausalLM, max_length: int | None) -> int:
    """Resolve `--max-length`: None is the model's context, at most 4,096 tokens, since few passages need more."""
    context = model.config.max_position_embeddings
    if max_length and max_length > context:
        raise UserError(f"--max-length {max_length}: the model's context has {context} tokens; longer passages are read "
                        "in pieces, so give at most that")
    return max_length or min(context, 4096)


def load_tokenizer(path: Path, folder: Path, **kwargs) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
    except Exception as error:  # the libraries raise anything, bare Exception too, over a broken file
        raise UserError(f"{path} has no tokenizer that can be loaded: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(
            f"{path} has the tokenizer {type(tokenizer).__name__}, which gives no character offsets; "
            "expected one with a tokenizer.json"
        )
    if path.is_file():  # older transformers take the special tokens of the tokenizer's class, not those of the file
        found = gguf_values(path, set(GGUF_SPECIAL_TOKENS))
        for key, id in found.items():
            setattr(tokenizer, GGUF_SPECIAL_TOKENS[key], tokenizer.convert_ids_to_tokens(id))
    return tokenizer


def check_base_folder(folder: Path) -> None:
    """Its config.json says that it is a LLaMA with ordinary weights."""
    expect_family(folder, "llama")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if packing := config.get("quantization_config"):
        method = packing.get("quant_method", "an unnamed method")
        raise UserError(f"{folder} holds weights packed by {method}; give the model without it, or a .gguf")


def check_gguf(file: Path) -> None:
    """Its header says that it is a LLaMA."""
    try:
        architecture = gguf_architecture(file)
    except (OSError, ValueError, struct.error) as error:
        raise UserError(f"{file} is not a readable .gguf file ({error}); copy it again") from None
    if architecture != "llama":
        raise UserError(f"{file} holds a model of the architecture {architecture!r}; expected 'llama'")


# The metadata types of fixed size, in struct's letters; 8 is a string, 9 an array.
GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_SPECIAL_TOKENS = {f"tokenizer.ggml.{key}_token_id": f"{name}_token" for key, name in
                       (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad"))}


def gguf_architecture(file: Path) -> str | None:
    """The value of general.architecture."""
    return gguf_values(file, {"general.architecture"}).get("general.architecture")


def gguf_values(file: Path, keys: set[str]) -> dict[str, object]:
    """Those of a file's metadata that have these keys, in the file's order; it is read until all are found."""
    found: dict[str, object] = {}
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        _, _, num_pairs = _read(stream, "IQQ")
        for _ in range(num_pairs):
            key, (kind,) = _read_text(stream), _read(stream, "I")
            value = _read_value(stream, kind)
            if key in keys:
                found[key] = value
            if len(found) == len(keys):
                break
    return found


def _read(stream: BinaryIO, letters: str) -> tuple:
    layout = "<" + letters
    return struct.unpack(layout, stream.read(struct.calcsize(layout)))


def _read_text(stream: BinaryIO) -> str:
    (length,) = _read(stream, "Q")
    if length > 1 << 30:
        raise ValueError(f"a text of {length} bytes in its header")
    return stream.read(length).decode("utf-8", "replace")


def _read_value(stream: BinaryIO, kind: int) -> object:
    if kind == 8:
        return _read_text(stream)
    if kind == 9:
        inner, length = _read(stream, "IQ")
        return [_read_value(stream, inner) for _ in range(length)]
    if kind not in GGUF_NUMBERS:
        raise ValueError(f"unknown metadata type {kind}")
    return _read(stream, GGUF_NUMBERS[kind])[0]


def _forget_packing(model: LlamaForCausalLM) -> None:
    """An unpacked .gguf is an ordinary model, but one whose config still says "quantized" cannot be saved."""
    packed = [
        name for name, m in model.named_modules() if name.endswith("_proj") and type(m) is not nn.Linear
    ]
    assert not packed, f"LoRA needs nn.Linear layers: {packed}"
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def _keep_norms_in_fp64(model: LlamaForCausalLM) -> None:
    """LlamaRMSNorm computes in fp32 whatever it is given; --precision fp64 is there to be exact."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, LlamaRMSNorm)}
    for name, norm in norms.items():
        exact = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
        exact.weight = norm.weight
        _put(model, name, exact)


def export_merged(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save W + scale B A, in W's type, as a plain transformers model; `model` itself is unchanged after."""
    layers = lora_layers(model)
    was_merged = any(layer.merged for layer in layers.values())
    merge(model)
    try:
        for name, layer in layers.items():
            _put(model, name, layer.base)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        make_readable(folder)
    except OSError as error:
        raise UserError(f"--merge-into {folder}: cannot be written ({error.strerror})") from None
    finally:
        for name, layer in layers.items():
            _put(model, name, layer)
        if not was_merged:
            unmerge(model)


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
