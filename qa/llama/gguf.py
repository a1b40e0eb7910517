"""What we read of a .gguf file by ourselves: that it holds a LLaMA, and which tokens are its special ones.

llama.cpp's format begins with (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)

    "GGUF"  version u32  number of tensors u64  number of pairs u64  then pairs of key, type u32, value

transformers reads the rest: tokens, and weights in blocks of a few bits each. Used by: model.py.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from qa.errors import UserError

# The types of values; those of fixed size with struct's letters.
TEXT, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
SPECIAL_TOKENS = {f"tokenizer.ggml.{key}_token_id": f"{name}_token" for key, name in
                  (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad"))}


def check_gguf(file: Path) -> None:
    """Its header says that it is a LLaMA."""
    try:
        architecture = gguf_values(file, {"general.architecture"}).get("general.architecture")
    except (OSError, ValueError, struct.error) as error:
        raise UserError(f"{file} is not a readable .gguf file ({error}); copy it again") from None
    if architecture != "llama":
        raise UserError(f"{file} holds a model of the architecture {architecture!r}; expected 'llama'")


def set_special_tokens(tokenizer, file: Path) -> None:
    """Give the tokenizer the file's special tokens. Older versions of transformers leave it those of its class."""
    for key, id in gguf_values(file, set(SPECIAL_TOKENS)).items():
        setattr(tokenizer, SPECIAL_TOKENS[key], tokenizer.convert_ids_to_tokens(id))


def gguf_values(file: Path, keys: set[str]) -> dict[str, object]:
    """Those of a file's pairs that have these keys, in the file's order. Reads until all are found."""
    found: dict[str, object] = {}
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        _, _, num_pairs = _read(stream, "IQQ")
        for _ in range(num_pairs):
            key, (kind,) = _read_value(stream, TEXT), _read(stream, "I")
            value = _read_value(stream, kind)
            if key in keys:
                found[key] = value
            if len(found) == len(keys):
                break
    return found


def _read(stream: BinaryIO, letters: str) -> tuple:
    layout = f"<{letters}"
    return struct.unpack(layout, stream.read(struct.calcsize(layout)))


def _read_value(stream: BinaryIO, kind: int):
    if kind == TEXT:
        (length,) = _read(stream, "Q")
        if length > 1 << 30:
            raise ValueError(f"a text of {length} bytes in its header")
        return stream.read(length).decode("utf-8", "replace")
    if kind == ARRAY:
        inner, length = _read(stream, "IQ")
        return [_read_value(stream, inner) for _ in range(length)]
    if kind not in NUMBERS:
        raise ValueError(f"unknown metadata type {kind}")
    return _read(stream, NUMBERS[kind])[0]
