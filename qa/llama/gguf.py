"""What we ask of a .gguf file before transformers loads it: does it hold a LLaMA, and which tokens are its special ones?

The file, in llama.cpp's format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), begins with pairs such as

    general.architecture           "llama"
    tokenizer.ggml.eos_token_id    2

Used by: model.py.
"""

from __future__ import annotations

import struct
from pathlib import Path

from transformers.integrations.gguf import read_gguf_metadata

from qa.errors import UserError

SPECIAL_TOKENS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def check_gguf(file: Path) -> None:
    """Its header says that it is a LLaMA."""
    try:
        architecture = read_gguf_metadata(file)[0]["general.architecture"]
    except (OSError, ValueError, IndexError, OverflowError, struct.error) as error:
        raise UserError(f"{file} is not a readable .gguf file ({error}); copy it again") from None
    if architecture != "llama":
        raise UserError(f"{file} holds a model of the architecture {architecture!r}; expected 'llama'")


def set_special_tokens(tokenizer, file: Path) -> None:
    """Give the tokenizer the file's special tokens. Older versions of transformers leave it those of its class."""
    pairs, _ = read_gguf_metadata(file)
    for key, name in SPECIAL_TOKENS.items():
        if (id := pairs.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(id))
