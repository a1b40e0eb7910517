"""What we ask of a .gguf file before transformers loads it: does it hold a LLaMA, and which tokens are its special ones? And
that it is parsed once.

The file, in llama.cpp's format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), begins with pairs such as

    general.architecture           "llama"
    tokenizer.ggml.eos_token_id    2

Used by: model.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path

from transformers.integrations.gguf import read_gguf_metadata

from qa.errors import UserError
from qa.schema import check_fields, optional, whole

SPECIAL_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
SIZES = dict.fromkeys(("llama.block_count", "llama.embedding_length", "llama.feed_forward_length"), whole(1))


def check_gguf(file: Path) -> None:
    """Its header says that it is a LLaMA, of a size that the file can hold."""
    try:
        pairs, _ = read_gguf_metadata(file)
        architecture = pairs["general.architecture"]
    except Exception as error:  # a wrong length or type in the header ends in any of a dozen
        raise UserError(f"{file} is not a readable .gguf file ({error!r:.200}); copy it again") from None
    if architecture != "llama":
        raise UserError(f"{file} holds a model of the architecture {architecture!r:.200}; expected 'llama'")
    check_fields(pairs, file, SIZES | {f"tokenizer.ggml.{name}_token_id": optional(whole(0)) for name in SPECIAL_TOKENS})
    layers, hidden, intermediate = (pairs[name] for name in SIZES)
    if 2 * layers * hidden * intermediate > 8 * file.stat().st_size:
        raise UserError(f"{file} is too short for the {layers} layers, {hidden} wide, that its header tells; copy it again")


@contextlib.contextmanager
def parsed_once(path: Path) -> Iterator[None]:
    """In here transformers parses a .gguf file once, not for the configuration, the tokenizer and the weights again.

    Nor does it make the table of llama.cpp's names anew for each module. A folder is left alone.
    """
    if not path.is_file():
        yield
        return
    gguf = importlib.import_module("gguf")
    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in slow.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in slow.items():
            setattr(gguf, name, function)


def set_special_tokens(tokenizer, file: Path) -> None:
    """Give the tokenizer the file's special tokens. Older versions of transformers leave it those of its class."""
    pairs, _ = read_gguf_metadata(file)
    for key, name in SPECIAL_TOKENS.items():
        if (id := pairs.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(id))
