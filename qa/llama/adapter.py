"""A LoRA adapter on disk: the folder that peft and vLLM load, and a file of our own beside it.

    adapter_config.json         rank, alpha, which layers: `LoraSpec` in peft's words
    adapter_model.safetensors   base_model.model.<path>.lora_A.weight [r, in], .lora_B.weight [out, r]; fp32
    qa_lora.json                the base's name and fingerprint (older ones: the prompt too)

`train_llama.py` writes it as its product, `qa/reader.py` reads it. We read peft's folders too, if they say no more than "add
scale * B A to these linear layers". Whatever else changes the function of the model (DoRA, retrained embeddings, biases, a
start that edits the base's weights, ...) is refused by its name: without it the adapter would answer, only worse. The
config's fields are those of peft 0.21, `peft/tuners/lora/config.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from qa.errors import UserError
from qa.files import write_bytes, write_json
from qa.llama.base_fingerprint import base_fingerprint, is_same_base
from qa.llama.lora import inject_lora, load_lora_state_dict, lora_layers, lora_state_dict
from qa.llama.targets import LoraSpec
from qa.schema import FLAG, OBJECT, TEXT, check_fields, either, list_of, number, object_of, optional, read_object, whole

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OWN_FILE = "qa_lora.json"
KEY_PREFIX = "base_model.model."

NAMES, BLOCK, ALPHA = either(list_of(TEXT), TEXT), whole(0), number(1e-38)
SPEC_FIELDS = {  # peft's name -> LoraSpec's, and what it may be. Three must be there: a guessed alpha would scale wrongly
    "r": ("rank", whole(1)),
    "lora_alpha": ("alpha", ALPHA),
    "lora_dropout": ("dropout", optional(number(0, 0.999))),
    "target_modules": ("targets", NAMES),
    "exclude_modules": ("exclude", optional(NAMES)),
    "layers_to_transform": ("blocks", optional(either(list_of(BLOCK), BLOCK))),
    "rank_pattern": ("rank_pattern", optional(object_of(whole(1)))),
    "alpha_pattern": ("alpha_pattern", optional(object_of(ALPHA))),
    "use_rslora": ("rslora", optional(FLAG)),
}
OWN_FIELDS = {"base_model": optional(TEXT), "base_fingerprint": object_of(TEXT), "extra": optional(OBJECT)}
# Fields that say nothing about the function of a trained adapter. Every other field must be off (null, false, empty), so one
# that a later peft invents is refused as well.
NEUTRAL_FIELDS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
    "task_type", "megatron_core", "qalora_group_size", "runtime_config",  # three that tune other fields
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # see init_lora_weights
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
    extra: dict  # of an older run: its prompt


def save_adapter(model: nn.Module, tokenizer, spec: LoraSpec, folder: Path, base_name: str,
                 fingerprint: dict[str, str]) -> None:
    """Write the three files, and the tokenizer. `fingerprint` is `base_fingerprint(model)`, taken once per run."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name}
    config |= {name: getattr(spec, spec_name) for name, (spec_name, _) in SPEC_FIELDS.items()}
    if str(spec.targets).lower() == "all-linear":  # vLLM does not know it: like peft, write the names that it means
        config["target_modules"] = sorted({name.rsplit(".", 1)[-1] for name in lora_layers(model)})
    config["exclude_modules"] = spec.exclude or None
    config |= {"bias": "none", "fan_in_fan_out": False, "inference_mode": True}
    tensors = {KEY_PREFIX + key: t.cpu().contiguous() for key, t in lora_state_dict(model).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    # ASCII, with escapes: peft opens it in the locale's encoding.
    write_bytes(folder / CONFIG_FILE, json.dumps(config, indent=1).encode("ascii"))
    write_json(folder / OWN_FILE, {"base_model": base_name, "base_fingerprint": fingerprint})


def read_adapter(folder: Path) -> Adapter:
    """Read and check the two JSON files. Raises UserError for anything that `LoraSpec` cannot express."""
    path = folder / CONFIG_FILE
    rules = {"peft_type": TEXT, "base_model_name_or_path": optional(TEXT)}
    config = read_object(path, "the folder of a LoRA adapter", rules | {name: rule for name, (_, rule) in SPEC_FIELDS.items()})
    if (kind := config.get("peft_type")) != "LORA":
        raise UserError(f"{path}: peft_type is {kind!r}; expected a 'LORA' adapter")
    for name, value in config.items():
        known = name in NEUTRAL_FIELDS or name in SPEC_FIELDS or value in HARMLESS_VALUES.get(name, ())
        if not known and value not in (None, False, [], {}, ""):
            raise UserError(f"{path}: {name} is {value!r}, more than plain LoRA; merge it with peft, and give the merged model")
    own = {}
    if (folder / OWN_FILE).is_file():
        own = read_object(folder / OWN_FILE, "our record of the base; delete it: --prompt decides then", OWN_FIELDS)
        check_fields(own["base_fingerprint"], folder / OWN_FILE, dict.fromkeys(("dtype", "bytes", "signs"), TEXT))
    base_name = own.get("base_model") or config.get("base_model_name_or_path")
    return Adapter(folder, _read_spec(config), base_name, own.get("base_fingerprint"), own.get("extra") or {})


def _read_spec(config: dict) -> LoraSpec:
    fields = {spec_name: config[name] for name, (spec_name, _) in SPEC_FIELDS.items() if config.get(name) is not None}
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    blocks = fields.pop("blocks", None)  # LoraSpec's defaults are peft's
    return LoraSpec(**fields, blocks=(blocks,) if isinstance(blocks, int) else blocks or None)


def load_adapter(model: nn.Module, adapter: Adapter, base_name: str | None = None) -> list[str]:
    """Inject the adapter into its base model and fill it. Returns warnings, at most one line each.

    Raises UserError if the adapter's tensors do not fit, or if our own file says that it was trained on other base weights.
    """
    folder, trained_on, warnings = adapter.folder, adapter.base_name, []
    if adapter.base_fingerprint and not is_same_base(adapter.base_fingerprint, base_fingerprint(model)):
        raise UserError(f"{folder} was trained on the base {trained_on!r}, whose weights differ from those of "
                        f"{base_name or 'this model'}; give the base that it was trained on")
    if base_name and trained_on and base_name != trained_on:
        note = "the weights are the same" if adapter.base_fingerprint else "the answers may be wrong"
        warnings.append(f"{folder} was trained on the base {trained_on!r}, not on {base_name!r}; {note}")
    inject_lora(model, adapter.spec, every_name=False, source=f"{folder / CONFIG_FILE}: target_modules")
    load_lora_state_dict(model, read_tensors(folder), source=str(folder / WEIGHTS_FILE))
    return warnings


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy the adapter again; peft must save it as safetensors") from None
    return {key.removeprefix(KEY_PREFIX): tensor for key, tensor in tensors.items()}
