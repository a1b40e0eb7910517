"""A LoRA adapter on disk: the folder that peft and vLLM load, and a file of our own beside it.

    adapter_config.json         rank, alpha, which layers: `LoraSpec` in peft's words
    adapter_model.safetensors   base_model.model.<path>.lora_A.weight [r, in], .lora_B.weight [out, r]; fp32
    qa_lora.json                the base's name and fingerprint (older ones: the prompt too)

`train_llama.py` writes it as its product, `evaluate.py` reads it. Folders that peft wrote are
read too, as long as they say nothing but "add scale * B A to these linear layers". Whatever else changes
the function of the model (DoRA, retrained embeddings, biases, a start that edits the base's weights, ...)
is refused by its name: served without it, the adapter would answer, only worse. The config's fields are
those of peft 0.21, `peft/tuners/lora/config.py`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from qa.errors import UserError
from qa.files import write_bytes, write_json
from qa.llama.lora import inject_lora, load_lora_state_dict, lora_layers, lora_state_dict
from qa.llama.targets import LoraSpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OWN_FILE = "qa_lora.json"
KEY_PREFIX = "base_model.model."

# Fields that say nothing about the function of a trained adapter. Every other field that `LoraSpec` has no
# place for must be off (null, false, empty), so one that a later peft invents is refused as well.
NEUTRAL_FIELDS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
    "task_type", "megatron_core", "qalora_group_size", "runtime_config",  # three that tune other fields
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # see init_lora_weights
}  # fmt: skip
SPEC_FIELDS = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "rank_pattern",
    "alpha_pattern", "layers_to_transform",
}  # fmt: skip
HARMLESS_VALUES = {
    "bias": ("none",),
    # These start A and B only; pissa, olora, corda, loftq, lora_ga also change the base under them.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "layers_pattern": ("layers", ["layers"]),
}


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder says, before any model is loaded."""

    folder: Path
    spec: LoraSpec
    base_name: str | None  # as the config has it: a hub id or a folder
    base_fingerprint: dict[str, str] | None  # None in a folder that peft wrote
    extra: dict = field(default_factory=dict)


def save_adapter(model: nn.Module, tokenizer, spec: LoraSpec, folder: Path, base_name: str,
                 fingerprint: dict[str, str]) -> None:
    """Write the three files, and the tokenizer. `fingerprint` is `base_fingerprint(model)`, taken once per run."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": _portable_targets(model, spec),
        "exclude_modules": _json_names(spec.exclude),
        "layers_to_transform": None if spec.blocks is None else list(spec.blocks),
        "rank_pattern": spec.rank_pattern,
        "alpha_pattern": spec.alpha_pattern,
        "use_rslora": spec.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = {KEY_PREFIX + key: t.cpu().contiguous() for key, t in lora_state_dict(model).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    # ASCII, with escapes: peft opens it in the locale's encoding.
    write_bytes(folder / CONFIG_FILE, json.dumps(config, indent=1).encode("ascii"))
    write_json(folder / OWN_FILE, {"base_model": base_name, "base_fingerprint": fingerprint})


def _portable_targets(model: nn.Module, spec: LoraSpec) -> list[str] | str:
    """vLLM does not know "all-linear": like peft, write down the names that it stood for."""
    if isinstance(spec.targets, str) and spec.targets.lower() == "all-linear":
        return sorted({name.rsplit(".", 1)[-1] for name in lora_layers(model)})
    return _json_names(spec.targets)


def _json_names(names: tuple[str, ...] | str) -> list[str] | str | None:
    return names if isinstance(names, str) else list(names) or None


def read_adapter(folder: Path) -> Adapter:
    """Read and check the two JSON files. Raises UserError for anything that `LoraSpec` cannot express."""
    config = _read_json(folder / CONFIG_FILE)
    if (kind := config.get("peft_type")) != "LORA":
        raise UserError(f"{folder / CONFIG_FILE}: peft_type is {kind!r}; expected a 'LORA' adapter")
    for name, value in config.items():
        known = name in NEUTRAL_FIELDS or name in SPEC_FIELDS or value in HARMLESS_VALUES.get(name, ())
        if not known and value not in (None, False, [], {}, ""):
            raise UserError(
                f"{folder / CONFIG_FILE}: {name} is {value!r}, which is more than plain LoRA and not "
                "supported; merge the adapter into its base with peft, and give the merged model"
            )
    own = _read_json(folder / OWN_FILE) if (folder / OWN_FILE).is_file() else {}
    fingerprint, extra = own.get("base_fingerprint"), own.get("extra", {})
    is_whole = isinstance(fingerprint, dict) and set(fingerprint) == {"dtype", "bytes", "signs"} and isinstance(extra, dict)
    if own and not is_whole:
        raise UserError(f"{folder / OWN_FILE} is damaged; copy it again, or delete it: then --prompt decides on the prompt")
    return Adapter(
        folder=folder,
        spec=_spec_from(config, folder / CONFIG_FILE),
        base_name=own.get("base_model") or config.get("base_model_name_or_path"),
        base_fingerprint=fingerprint,
        extra=extra,
    )


def _spec_from(config: dict, path: Path) -> LoraSpec:
    def value(name: str, kinds: tuple[type, ...], default=None):
        found = config.get(name)
        if found is None and default is not None:
            return default
        if not isinstance(found, kinds) or isinstance(found, bool) and bool not in kinds:
            kind = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f"{path}: {name} is {found!r}; expected {kind}, as peft writes it")
        return found

    names = [value("target_modules", (list, str)), value("exclude_modules", (list, str), [])]
    targets, exclude = (n if isinstance(n, str) else tuple(n) for n in names)
    blocks = value("layers_to_transform", (list, int), [])
    return LoraSpec(  # no defaults for r and alpha: a guessed alpha would scale wrongly in silence
        targets=targets,
        rank=value("r", (int,)),
        alpha=value("lora_alpha", (int, float)),
        dropout=value("lora_dropout", (int, float), 0.0),
        rslora=value("use_rslora", (bool,), False),
        rank_pattern=value("rank_pattern", (dict,), {}),
        alpha_pattern=value("alpha_pattern", (dict,), {}),
        exclude=exclude,
        blocks=(blocks,) if isinstance(blocks, int) else tuple(blocks) or None,
    )


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected the folder of a LoRA adapter") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); save the adapter again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object but a {type(content).__name__}; save the adapter again")
    return content


def load_adapter(model: nn.Module, adapter: Adapter, base_name: str | None = None) -> list[str]:
    """Inject the adapter into its base model and fill it. Returns warnings, at most one line each.

    Raises UserError if the base's weights are not those that the adapter was trained on (where our own file
    says which they were), or if a key is unmatched or missing, a shape does not fit, or nothing is
    targeted.
    """
    folder, trained_on, warnings = adapter.folder, adapter.base_name, []
    if adapter.base_fingerprint and not is_same_base(adapter.base_fingerprint, base_fingerprint(model)):
        raise UserError(
            f"{folder} was trained on the base {trained_on!r}, whose weights differ from those of "
            f"{base_name or 'this model'} (by their fingerprints); give the base that it was trained on"
        )
    if base_name and trained_on and base_name != trained_on:
        note = "the weights are the same" if adapter.base_fingerprint else "the answers may be wrong"
        warnings.append(f"{folder} was trained on the base {trained_on!r}, not on {base_name!r}; {note}")
    source = f"{folder / CONFIG_FILE}: target_modules"
    inject_lora(model, adapter.spec, every_name=False, source=source)
    load_lora_state_dict(model, read_tensors(folder), source=str(folder / WEIGHTS_FILE))
    return warnings


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist; adapters are read as safetensors only: save it so with peft")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); copy or save the adapter again") from None
    return {key.removeprefix(KEY_PREFIX): tensor for key, tensor in tensors.items()}


def base_fingerprint(model: nn.Module) -> dict[str, str]:
    """Which base weights these are, whether LoRA is injected, trained, merged or absent.

    "bytes" is the SHA-256 of names, shapes and all bytes. It changes with the type in which the base is
    held, so for a run in bf16 that is evaluated in fp32 there is "signs": the same over the sign of each
    number, which no rounding changes, while any other training of the model flips some. A 1B model takes a
    few seconds.
    """
    layers = lora_layers(model).values()
    added = {id(p) for layer in layers for p in (layer.lora_A.weight, layer.lora_B.weight)}
    kept = {id(layer.base.weight): layer.unmerged_weight for layer in layers if layer.merged}
    by_bytes, by_signs, dtypes = hashlib.sha256(), hashlib.sha256(), set()
    for name, parameter in model.named_parameters():
        if id(parameter) in added:
            continue
        weight = kept.get(id(parameter), parameter).detach().cpu().contiguous()
        label = f"{name.replace('.base.', '.')} {list(weight.shape)}\n".encode()
        flat = weight.flatten()
        for digest, content in ((by_bytes, flat.view(torch.uint8).numpy()), (by_signs, _packed_signs(flat))):
            digest.update(label)
            digest.update(content)
        dtypes.add(str(flat.dtype).removeprefix("torch."))
    return {"dtype": "+".join(sorted(dtypes)), "bytes": by_bytes.hexdigest(), "signs": by_signs.hexdigest()}


def _packed_signs(flat: torch.Tensor) -> np.ndarray:
    return np.packbits(flat.signbit().numpy())  # 8 signs a byte


def check_base(trained_on: dict[str, str], found: dict[str, str], name: str) -> None:
    """For --resume: the base must be the one that the run was begun with."""
    if not is_same_base(trained_on, found):
        raise UserError(f"--resume: the weights of {name} are not those that the run was begun with")


def is_same_base(one: dict[str, str], other: dict[str, str]) -> bool:
    key = "bytes" if one["dtype"] == other["dtype"] else "signs"
    return one[key] == other[key]
