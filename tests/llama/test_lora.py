"""qa/llama/lora.py and targets.py against the real peft, and by the identities that LoRA promises."""

from __future__ import annotations

import copy
import re

import peft
import pytest
import torch
from torch import nn

from qa.cpu.dropout import replace_dropout
from qa.errors import UserError
from qa.llama.lora import (
    LoRALinear,
    describe_trainable,
    inject_lora,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    merge,
    unmerge,
)
from qa.llama.targets import LoraSpec, targets_from_flag

IDS = torch.randint(0, 384, (2, 24), generator=torch.Generator().manual_seed(3))
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

SPECS = {
    "default": LoraSpec(),
    "all linear": LoraSpec(targets="all-linear", rank=4, alpha=4),
    "rslora": LoraSpec(targets=ALL, rank=6, alpha=10, rslora=True),
    "patterns": LoraSpec(
        targets=ALL,
        rank=4,
        alpha=8,
        rank_pattern={r"layers\.1\.self_attn\.[qk]_proj": 2, "q_proj": 3, "0.mlp.up_proj": 7},
        alpha_pattern={"v_proj": 5, "v_pro": 99},
    ),
    "regex": LoraSpec(targets=r"model\.layers\.1\..*(q|down)_proj", rank=8, alpha=12),
    "exclude and blocks": LoraSpec(
        targets=ALL, rank=2, alpha=3, exclude=("0.mlp.up_proj", "o_proj"), blocks=(0,)
    ),
}


def peft_config(spec: LoraSpec) -> peft.LoraConfig:
    """The same adapter in peft's own words."""
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=spec.targets if isinstance(spec.targets, str) else list(spec.targets),
        exclude_modules=list(spec.exclude) or None,
        layers_to_transform=None if spec.blocks is None else list(spec.blocks),
        use_rslora=spec.rslora,
        rank_pattern=spec.rank_pattern,
        alpha_pattern=spec.alpha_pattern,
    )


def randomise(model: nn.Module, seed: int = 1) -> None:
    """B is zero at the start, which hides most mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora_B.weight.data = (
            torch.randn(layer.lora_B.weight.shape, generator=generator).to(layer.lora_B.weight) * 0.1
        )


def loss_of(model: nn.Module) -> torch.Tensor:
    logits = model(input_ids=IDS, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())


@pytest.mark.parametrize("name", SPECS)
def test_logits_and_gradients_equal_peft(tiny_llama, name):
    spec = SPECS[name]
    theirs = copy.deepcopy(tiny_llama)
    torch.manual_seed(7)
    inject_lora(tiny_llama, spec)
    torch.manual_seed(7)
    theirs = peft.get_peft_model(theirs, peft_config(spec))

    pairs = dict(theirs.named_parameters())
    prefix = "base_model.model."
    names = {
        key: f"{prefix}{key}".replace(".weight", ".default.weight") for key in lora_state_dict(tiny_llama)
    }
    assert set(names.values()) == {n for n, p in pairs.items() if p.requires_grad}
    for key, value in lora_state_dict(tiny_llama).items():  # the same start from the same seed
        assert torch.equal(value, pairs[names[key]].data)

    randomise(tiny_llama)
    ours = dict(tiny_llama.named_parameters())
    for key, name_there in names.items():
        pairs[name_there].data.copy_(ours[key].data)
    logits, expected = tiny_llama(input_ids=IDS).logits, theirs(input_ids=IDS).logits
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()

    loss_of(tiny_llama).backward()
    loss_of(theirs).backward()
    for key, name_there in names.items():
        gradient, expected = ours[key].grad, pairs[name_there].grad
        assert (gradient - expected).norm() <= 1e-5 * expected.norm() > 0


def test_dropout_equals_peft(tiny_llama):
    spec = LoraSpec(dropout=0.3, rank=4, alpha=8)
    theirs = copy.deepcopy(tiny_llama)
    torch.manual_seed(7)
    inject_lora(tiny_llama, spec)
    randomise(tiny_llama)
    theirs = peft.get_peft_model(theirs, peft_config(spec))
    for key, value in lora_state_dict(tiny_llama).items():
        theirs.get_parameter(f"base_model.model.{key}".replace(".weight", ".default.weight")).data.copy_(
            value
        )
    torch.manual_seed(9)
    ours = tiny_llama.train()(input_ids=IDS).logits
    torch.manual_seed(9)
    expected = theirs.train()(input_ids=IDS).logits
    assert (ours - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert not torch.equal(ours, tiny_llama.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_equals_the_equation(dtype, bias):
    torch.manual_seed(0)
    base = nn.Linear(24, 10, bias=bias).to(dtype)
    layer = LoRALinear(base, rank=3, scale=1.5, dropout=0.0)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(5, 24).to(dtype)
    a, b = layer.lora_A.weight.double(), layer.lora_B.weight.double()
    expected = base(x).double() + 1.5 * (x.double() @ a.T @ b.T)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x), expected.to(dtype))
    stored = torch.float64 if dtype == torch.float64 else torch.float32
    assert a.shape == (3, 24) and b.shape == (10, 3)
    assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_b_leaves_logits_unchanged_to_the_bit(tiny_llama, dtype):
    model = tiny_llama.to(dtype)
    before = model(input_ids=IDS).logits
    inject_lora(model, LoraSpec(targets="all-linear"))
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_merged_equals_unmerged_and_unmerge_restores_the_bits(tiny_llama):
    inject_lora(tiny_llama, SPECS["patterns"])
    randomise(tiny_llama)
    weights = {name: p.clone() for name, p in tiny_llama.named_parameters()}
    unmerged = tiny_llama(input_ids=IDS).logits
    merge(tiny_llama)
    merged = tiny_llama(input_ids=IDS).logits
    assert not torch.equal(merged, unmerged)
    assert (merged - unmerged).abs().max() <= 1e-4
    merge(tiny_llama)  # a second time does nothing
    assert torch.equal(tiny_llama(input_ids=IDS).logits, merged)
    tiny_llama.eval()
    unmerge(tiny_llama)
    unmerge(tiny_llama)
    assert all(torch.equal(p, weights[name]) for name, p in tiny_llama.named_parameters())
    assert torch.equal(tiny_llama(input_ids=IDS).logits, unmerged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_merges_in_fp32_then_rounds(tiny_llama, dtype):
    inject_lora(tiny_llama.to(dtype), LoraSpec(rank=4))
    randomise(tiny_llama)
    layer = tiny_llama.model.layers[1].self_attn.o_proj
    kept = layer.base.weight.clone()
    expected = (kept.float() + layer.scale * (layer.lora_B.weight @ layer.lora_A.weight)).to(dtype)
    merge(tiny_llama)
    assert torch.equal(layer.base.weight, expected) and not torch.equal(expected, kept)
    unmerge(tiny_llama)
    assert torch.equal(layer.base.weight, kept)


def test_eval_and_train_do_not_merge(tiny_llama):
    inject_lora(tiny_llama, LoraSpec())
    randomise(tiny_llama)
    weight = tiny_llama.model.layers[0].self_attn.q_proj.base.weight.clone()
    tiny_llama.train().eval()
    assert torch.equal(tiny_llama.model.layers[0].self_attn.q_proj.base.weight, weight)
    assert not any(layer.merged for layer in lora_layers(tiny_llama).values())


def test_only_a_and_b_train_and_the_table_says_so(tiny_llama):
    names = inject_lora(tiny_llama, LoraSpec(rank=8))
    assert names == [f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in SPECS["default"].targets]
    trainable = {name: p.numel() for name, p in tiny_llama.named_parameters() if p.requires_grad}
    assert trainable.keys() == lora_state_dict(tiny_llama).keys()
    trained = sum(trainable.values())
    assert trained == 2 * 8 * ((64 + 64) * 2 + (64 + 32) * 2)
    table = describe_trainable(tiny_llama)
    assert re.search(r"layers\.\*\.self_attn\.k_proj\.lora_B\.weight +\[32, 8\] +x 2 +512\b", table)
    total = sum(p.numel() for p in tiny_llama.parameters())
    assert table.splitlines()[-1] == f"trains {trained:,} of {total:,} parameters ({trained / total:.2%})"


def test_dropout_gives_its_place_to_the_fast_one(tiny_llama):
    inject_lora(tiny_llama, LoraSpec(dropout=0.25))
    assert replace_dropout(tiny_llama) == 2 * 4
    assert {layer.dropout.p for layer in lora_layers(tiny_llama).values()} == {0.25}


@pytest.mark.parametrize(
    ("targets", "found"),
    [(("query",), "'query'"), (("q_proj", "k_porj"), "'k_porj'"), ((), "''"), (r"model\.nothing", "nothing")],
)
def test_a_target_that_matches_nothing_lists_what_there_is(tiny_llama, targets, found):
    with pytest.raises(UserError) as error:
        inject_lora(tiny_llama, LoraSpec(targets=targets))
    assert "--target" in str(error.value) and found in str(error.value)
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in str(error.value)
    assert "lm_head" not in str(error.value) and "\n" not in str(error.value)


def test_a_target_that_is_no_linear_layer_is_refused(tiny_llama):
    with pytest.raises(UserError, match="LlamaMLP"):
        inject_lora(tiny_llama, LoraSpec(targets=("mlp",)))


@pytest.mark.parametrize("tie", [False, True])
def test_the_head_can_be_named_unless_it_is_tied(tiny_llama_factory, tie):
    model, spec = tiny_llama_factory(tie=tie), LoraSpec(targets=("lm_head",))
    if tie:
        with pytest.raises(UserError, match="lm_head, which shares its weight"):
            inject_lora(model, spec)
    else:
        assert inject_lora(model, spec) == ["lm_head"]


def test_packed_and_wrapped_layers_are_refused(tiny_llama):
    class PackedLinear(nn.Linear):
        pass

    with pytest.raises(AssertionError, match="PackedLinear"):
        LoRALinear(PackedLinear(4, 4), 2, 1.0, 0.0)
    inject_lora(tiny_llama, LoraSpec())
    with pytest.raises(AssertionError, match="already"):
        inject_lora(tiny_llama, LoraSpec(targets=("up_proj",)))


def test_a_merged_model_cannot_be_trained(tiny_llama):
    inject_lora(tiny_llama, LoraSpec())
    merge(tiny_llama)
    with pytest.raises(AssertionError, match="unmerge first"):
        loss_of(tiny_llama.train())


def test_a_rank_above_the_layers_size_is_refused(tiny_llama):
    with pytest.raises(UserError, match="--rank .* is 97, but model.layers.0.self_attn.q_proj has only 64 inputs"):
        inject_lora(tiny_llama, LoraSpec(rank=97))


def test_the_flag_takes_short_names():
    assert targets_from_flag("q,k,v,o") == LoraSpec().targets
    assert targets_from_flag("q_proj, down") == ("q_proj", "down_proj")
    assert targets_from_flag("all-linear") == "all-linear"


def test_state_loads_back_and_only_where_it_fits(tiny_llama):
    other = copy.deepcopy(tiny_llama)
    inject_lora(tiny_llama, LoraSpec(rank=4))
    randomise(tiny_llama)
    state = {key: value.clone() for key, value in lora_state_dict(tiny_llama).items()}
    inject_lora(other, LoraSpec(rank=4))
    load_lora_state_dict(other, state, "state")
    assert torch.equal(other(input_ids=IDS).logits, tiny_llama(input_ids=IDS).logits)

    key = next(iter(state))
    with pytest.raises(UserError, match="1 missing keys, such as model.layers.0"):
        load_lora_state_dict(other, {k: v for k, v in state.items() if k != key}, "state")
    with pytest.raises(UserError, match="1 unmatched keys, such as lm_head"):
        load_lora_state_dict(other, state | {"lm_head.lora_A.weight": state[key]}, "state")
    with pytest.raises(UserError, match=r"has shape \[4, 63\], expected \[4, 64\]"):
        load_lora_state_dict(other, state | {key: state[key][:, 1:]}, "state")


def test_fp16_with_grad_scaler_trains_and_keeps_the_base(tiny_llama):
    model = tiny_llama.half().train()
    base = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(0)
    inject_lora(model, LoraSpec(rank=8, alpha=16, dropout=0.05))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    losses = []
    for _ in range(50):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert nn.utils.clip_grad_norm_(trained, 1.0).isfinite()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trained)
    unchanged = {
        name.replace(".base.", "."): p for name, p in model.named_parameters() if "lora_" not in name
    }
    assert unchanged.keys() == base.keys()
    assert all(p.dtype == torch.float16 and torch.equal(p, base[name]) for name, p in unchanged.items())
