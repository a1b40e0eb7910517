"""qa/llama/adapter.py: our folders load in the real peft, peft's load here; what does not fit is refused."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from qa.errors import UserError
from qa.llama.adapter import (
    CONFIG_FILE,
    OWN_FILE,
    WEIGHTS_FILE,
    load_adapter,
    read_adapter,
    save_adapter,
)
from qa.llama.base_fingerprint import base_fingerprint, is_same_base
from qa.llama.lora import inject_lora, lora_layers, lora_state_dict, merge
from qa.llama.prompt import PromptTemplate
from qa.llama.targets import LoraSpec

IDS = torch.randint(0, 384, (2, 24), generator=torch.Generator().manual_seed(3))
FEW = ["q_proj", "v_proj", "down_proj"]

THEIR_SETTINGS = {
    "list": {"target_modules": FEW},
    "full paths": {"target_modules": ["model.layers.0.self_attn.q_proj", "1.mlp.up_proj"]},
    "a name that LLaMA lacks": {"target_modules": ["q_proj", "query_key_value"]},
    "regex": {"target_modules": r".*\.layers\.1\.self_attn\.(q|o)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": FEW, "use_rslora": True},
    "patterns": {
        "target_modules": FEW,
        # In alphabetical order, as peft saves them; the first match wins.
        "rank_pattern": {"layers.1.mlp.down_proj": 7, r"model\.layers\.1\.self_attn\.q_proj": 5, "q_proj": 2},
        "alpha_pattern": {r"1\.self_attn.*": 9, "v_proj": 3},
        "use_rslora": True,
    },
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["up_proj", "0.self_attn.q_proj"]},
    "exclude by regex": {"target_modules": FEW, "exclude_modules": r".*layers\.0.*"},
    "one block": {"target_modules": FEW, "layers_to_transform": 1, "layers_pattern": "layers"},
    "blocks": {"target_modules": FEW, "layers_to_transform": [0]},
    "gaussian start": {"target_modules": FEW, "init_lora_weights": "gaussian"},
}

OUR_SPECS = {
    "default": LoraSpec(dropout=0.1),
    "regex": LoraSpec(targets=r"model\.layers\.1\..*(q|down)_proj", rank=3),
    "all-linear": LoraSpec(targets="all-linear", rank=4, alpha=6),
    "rslora and patterns": LoraSpec(
        targets=tuple(FEW),
        rank=4,
        alpha=5,
        rslora=True,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"0.*q_proj": 9},
    ),
    "exclude and blocks": LoraSpec(targets=("q_proj", "up_proj"), exclude=("up_proj",), blocks=(1,)),
}


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def their_folder(base, folder, **settings):
    """peft's model, with settings of its own, saved by peft."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **settings)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomise(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", THEIR_SETTINGS)
def test_folders_of_peft_load_here(tiny_llama, tmp_path, name):
    theirs = their_folder(tiny_llama, tmp_path, **THEIR_SETTINGS[name])
    adapter = read_adapter(tmp_path)
    assert adapter.base_fingerprint is None and adapter.extra == {}
    assert load_adapter(tiny_llama, adapter) == []
    logits, expected = tiny_llama(input_ids=IDS).logits, theirs(input_ids=IDS).logits
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert lora_state_dict(tiny_llama).keys() == {
        n.removeprefix("base_model.model.").replace(".default.", ".")
        for n, p in theirs.named_parameters()
        if "lora_" in n
    }


def test_a_copy_of_the_bases_head_is_an_unmatched_key(tiny_llama, tmp_path):
    """peft adds the head itself to the file when it is a target, and when the vocabulary was extended."""
    their_folder(tiny_llama, tmp_path, target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match=r"1 unmatched keys, such as lm_head\.base_layer\.weight"):
        load_adapter(tiny_llama, read_adapter(tmp_path))


def test_the_word_all_linear_in_a_file_means_what_peft_takes_it_for(tiny_llama, tmp_path):
    theirs = their_folder(tiny_llama, tmp_path, target_modules="all-linear")
    change_config(tmp_path, target_modules="all-linear")
    load_adapter(tiny_llama, read_adapter(tmp_path))
    logits, expected = tiny_llama(input_ids=IDS).logits, theirs(input_ids=IDS).logits
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("name", OUR_SPECS)
def test_our_folders_load_in_peft_and_here(tiny_llama, byte_level_tokenizer, tmp_path, name):
    base, again = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    fingerprint = base_fingerprint(base)
    inject_lora(tiny_llama, OUR_SPECS[name])
    randomise(tiny_llama)
    save_adapter(tiny_llama, byte_level_tokenizer, OUR_SPECS[name], tmp_path, "models/Zürich", fingerprint)
    assert (tmp_path / CONFIG_FILE).read_bytes().isascii()  # peft opens it in the locale's encoding
    expected = tiny_llama(input_ids=IDS).logits

    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    in_file = {key.replace(".weight", ".default.weight") for key in load_file(tmp_path / WEIGHTS_FILE)}
    assert in_file == {key for key, _ in theirs.named_parameters() if "lora_" in key}
    assert (theirs(input_ids=IDS).logits - expected).abs().max() <= 1e-6 * expected.abs().max()

    adapter = read_adapter(tmp_path)
    assert (adapter.base_name, adapter.extra) == ("models/Zürich", {})
    assert load_adapter(again, adapter, "models/Zürich") == []
    assert torch.equal(again(input_ids=IDS).logits, expected)
    assert adapter.spec.rank == OUR_SPECS[name].rank and adapter.spec.dropout == OUR_SPECS[name].dropout


def test_a_loaded_adapter_trains_on(tiny_llama, tmp_path):
    their_folder(tiny_llama, tmp_path, target_modules=FEW, lora_dropout=0.5)
    load_adapter(tiny_llama, read_adapter(tmp_path))
    assert all(layer.dropout.p == 0.5 for layer in lora_layers(tiny_llama).values())
    assert {n for n, p in tiny_llama.named_parameters() if p.requires_grad} == lora_state_dict(
        tiny_llama
    ).keys()


def change_config(folder, remove=(), **changes):
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in remove}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("peft_type", "LOHA"),
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("trainable_token_indices", [3]),
        ("layer_replication", [[0, 2], [0, 2]]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("alora_invocation_tokens", [5, 6]),
        ("use_qalora", True),
        ("layers_pattern", ["h"]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("a_field_of_a_later_peft", 1),
        ("target_modules", None),
        ("r", "8"),
        ("r", 0),
        ("lora_alpha", True),
        ("lora_alpha", 0),
        ("lora_alpha", float("inf")),
        ("lora_dropout", 1.0),
        ("rank_pattern", {"q_proj": -1}),
        ("alpha_pattern", {"q_proj": float("nan")}),
        ("target_modules", [["q_proj"]]),
        ("base_model_name_or_path", 5),
        ("rank_pattern", {"(": 2}),
        ("target_modules", "(q_proj"),
    ],
)
def test_what_changes_the_function_is_refused_by_name(tiny_llama, tmp_path, name, value):
    their_folder(tiny_llama, tmp_path, target_modules=FEW)
    change_config(tmp_path, **{name: value})
    with pytest.raises(UserError) as error:
        read_adapter(tmp_path)
    wanted = "(" if "(" in str(value) and name in ("rank_pattern", "target_modules") else name
    assert {"r": "r "}.get(wanted, wanted) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_nothing_essential_is_guessed(tiny_llama, tmp_path, name):
    their_folder(tiny_llama, tmp_path, target_modules=FEW)
    change_config(tmp_path, remove=[name])
    with pytest.raises(UserError, match=f"{name} is missing"):
        read_adapter(tmp_path)


def test_every_field_that_peft_writes_by_default_is_known(tiny_llama, tmp_path):
    their_folder(tiny_llama, tmp_path, target_modules=FEW)
    written = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert written["target_modules"] and len(written) > 30
    read_adapter(tmp_path)


def test_keys_and_shapes_are_checked_strictly(tiny_llama, tmp_path):
    their_folder(tiny_llama, tmp_path, target_modules=FEW)
    path = tmp_path / WEIGHTS_FILE
    tensors = load_file(path)
    key = min(tensors)

    def problem(changed):
        save_file(changed, path)
        with pytest.raises(UserError, match=str(path)) as error:
            load_adapter(copy.deepcopy(tiny_llama), read_adapter(tmp_path))
        return str(error.value)

    assert "1 missing keys" in problem({k: v for k, v in tensors.items() if k != key})
    assert "1 unmatched keys" in problem(tensors | {"base_model.model.lm_head.weight": torch.zeros(2)})
    assert "unmatched keys" in problem({f"model.{k}": v for k, v in tensors.items()})
    assert "has shape [4, 95]" in problem(tensors | {key: tensors[key][:, 1:].contiguous()})
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match="cannot be read"):
        load_adapter(copy.deepcopy(tiny_llama), read_adapter(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match="cannot be read.*No such file"):
        load_adapter(copy.deepcopy(tiny_llama), read_adapter(tmp_path))


def test_another_rank_than_the_tensors_have_is_refused(tiny_llama, tmp_path):
    their_folder(tiny_llama, tmp_path, target_modules=FEW)
    change_config(tmp_path, r=8)
    with pytest.raises(UserError, match=r"expected \[8, "):
        load_adapter(tiny_llama, read_adapter(tmp_path))


def test_zero_injected_layers_are_refused(tiny_llama, tmp_path):
    their_folder(tiny_llama, tmp_path, target_modules=FEW)
    change_config(tmp_path, target_modules=["c_attn"])
    with pytest.raises(UserError, match="target_modules 'c_attn' matches no layer"):
        load_adapter(tiny_llama, read_adapter(tmp_path))


@pytest.mark.parametrize("content", ["{", "[1]", None])
def test_a_broken_config_is_the_users_error(tmp_path, content):
    if content is not None:
        (tmp_path / CONFIG_FILE).write_text(content)
    with pytest.raises(UserError, match=CONFIG_FILE):
        read_adapter(tmp_path)


@pytest.fixture
def saved(tiny_llama, byte_level_tokenizer, tmp_path):
    base = copy.deepcopy(tiny_llama)
    inject_lora(tiny_llama, LoraSpec())
    randomise(tiny_llama)
    save_adapter(tiny_llama, byte_level_tokenizer, LoraSpec(), tmp_path, "base-a", base_fingerprint(base))
    return base, tmp_path


def test_a_base_of_another_name_is_a_warning(saved):
    base, folder = saved
    (warning,) = load_adapter(base, read_adapter(folder), "base-b")
    assert "'base-a'" in warning and "'base-b'" in warning and "the weights are the same" in warning


def test_a_base_of_another_name_and_unknown_weights_is_a_graver_warning(saved):
    base, folder = saved
    (folder / OWN_FILE).unlink()
    (warning,) = load_adapter(base, read_adapter(folder), "base-b")
    assert "the answers may be wrong" in warning


@pytest.mark.parametrize("damage", [{"base_fingerprint": {"dtype": "float32"}}, {"base_fingerprint": None}, {"extra": 5}])
def test_a_damaged_file_of_our_own_is_named(saved, damage):
    _, folder = saved
    own = json.loads((folder / OWN_FILE).read_text())
    (folder / OWN_FILE).write_text(json.dumps(own | damage))
    with pytest.raises(UserError, match=f"{OWN_FILE}: (base_fingerprint|extra|bytes) is "):
        read_adapter(folder)


def test_damaged_prompt_settings_are_named(byte_level_tokenizer):
    with pytest.raises(UserError, match="prompt settings are damaged"):
        PromptTemplate.from_settings(byte_level_tokenizer, {"kind": "plain"})


def test_a_base_of_another_fingerprint_is_an_error(saved, tiny_llama_factory):
    base, folder = saved
    with pytest.raises(UserError, match="'base-a'.*weights differ"):
        load_adapter(tiny_llama_factory(seed=1), read_adapter(folder), "base-a")
    base.model.layers[1].mlp.up_proj.weight.data[3, 5] *= 1.001
    with pytest.raises(UserError, match="weights differ"):
        load_adapter(base, read_adapter(folder), "base-a")


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16, torch.float64])
def test_a_base_held_in_another_type_is_the_same_base(saved, tiny_llama_factory, held):
    base, folder = saved
    assert load_adapter(base.to(held), read_adapter(folder), "base-a") == []
    other = tiny_llama_factory(seed=1).to(held)
    with pytest.raises(UserError, match="weights differ"):
        load_adapter(other, read_adapter(folder), "base-a")


@pytest.mark.parametrize("tie", [False, True])
def test_the_fingerprint_ignores_lora(tiny_llama_factory, tie):
    model = tiny_llama_factory(tie=tie, attention_bias=True)
    before = base_fingerprint(model)
    assert base_fingerprint(tiny_llama_factory(tie=tie, attention_bias=True)) == before
    inject_lora(model, LoraSpec(targets="all-linear"))
    assert base_fingerprint(model) == before
    randomise(model)
    merge(model)
    assert base_fingerprint(model) == before


def test_the_fingerprint_sees_every_tensor(tiny_llama):
    before = base_fingerprint(tiny_llama)
    for parameter in tiny_llama.parameters():
        kept = parameter.data.clone()
        parameter.data.view(-1)[-1] = -parameter.data.view(-1)[-1]
        after = base_fingerprint(tiny_llama)
        assert after["bytes"] != before["bytes"] and after["signs"] != before["signs"]
        parameter.data = kept
    assert is_same_base(base_fingerprint(tiny_llama), before)
