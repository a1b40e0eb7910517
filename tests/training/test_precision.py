"""Number formats: what autocast computes in, what `auto` takes, and a GradScaler that skips what overflows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qa.errors import UserError
from qa.training.optim import make_adamw
from qa.training.precision import Precision, choose_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("name, computed, stored", [
    ("fp32", torch.float32, torch.float32), ("bf16", torch.bfloat16, torch.float32),
    ("fp16", torch.float16, torch.float32), ("fp64", torch.float64, torch.float64)])
def test_autocast_computes_in_the_named_type(name, computed, stored):
    precision = choose_precision(name, CPU)
    assert precision == Precision(name, "cpu") and precision.parameter_dtype == stored
    linear = nn.Linear(3, 3).to(stored)
    for _ in range(2):  # a fresh context each time
        with precision.autocast():
            assert linear(torch.ones(1, 3, dtype=stored)).dtype == computed
    assert linear(torch.ones(1, 3, dtype=stored)).dtype == stored
    assert precision.grad_scaler().is_enabled() == (name == "fp16")


@pytest.mark.parametrize("capabilities, expected", [
    ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"amx_tile": True}, "bf16"),
    ({"avx512_bf16": False, "amx_tile": False, "avx512": True}, "fp32"), ({}, "fp32")])
def test_auto_on_a_cpu_takes_bf16_where_it_is_native(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision("auto", CPU) == Precision(expected, "cpu")


@pytest.mark.parametrize("native", [True, False])
def test_auto_on_a_gpu_does_not_take_emulated_bf16(native, monkeypatch):
    """As on T4 and V100, where is_bf16_supported() is true all the same."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert choose_precision("auto", torch.device("cuda")) == Precision("bf16" if native else "fp16", "cuda")


def test_this_machines_auto_can_be_computed():
    precision = choose_precision("auto", CPU)
    with precision.autocast():
        assert nn.Linear(4, 4)(torch.ones(1, 4)).isfinite().all()


def test_unknown_precision_is_refused_in_one_line():
    with pytest.raises(UserError) as error:
        choose_precision("int8", CPU)
    assert "--precision int8" in str(error.value) and "bf16" in str(error.value) and "\n" not in str(error.value)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, precision: Precision,
         broken: bool) -> tuple[bool, float]:
    """The training scripts' step, with an infinity put into one gradient; returns (skipped, gradient norm)."""
    with precision.autocast():
        loss = model(torch.ones(2, 8)).float().square().mean()
    scaler.scale(loss).backward()
    if broken:
        model[0].weight.grad[3, 5] = torch.inf
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return scaler.get_scale() < scale, float(norm)


@pytest.mark.parametrize("seed", [0, 1])
def test_fp16_skips_an_infinite_gradient_and_shows_it_by_a_falling_scale(seed):
    torch.manual_seed(seed)
    precision = choose_precision("fp16", CPU)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))
    optimizer, scaler = make_adamw(model, 0.01, 0.01), precision.grad_scaler()
    skips, num_updates = [], 0
    for number in range(12):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        broken = number in (0, 4, 5)
        skipped, norm = step(model, optimizer, scaler, precision, broken)
        skips.append(skipped)
        changed = [not torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True)]
        assert not any(changed) if broken else all(changed)
        assert broken != (0 < norm < float("inf"))
        num_updates += not skipped
    assert [number for number, skipped in enumerate(skips) if skipped] == [0, 4, 5]
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())
    # AdamW counts the updates that were made, and none of the skipped ones.
    assert {int(state["step"]) for state in optimizer.state.values()} == {num_updates}


def test_scalers_state_round_trip():
    precision = choose_precision("fp16", CPU)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 1))
    optimizer, scaler = make_adamw(model, 0.01, 0.0), precision.grad_scaler()
    for broken in (True, True, False):
        step(model, optimizer, scaler, precision, broken)
    resumed = precision.grad_scaler()
    resumed.load_state_dict(scaler.state_dict())
    assert resumed.get_scale() == scaler.get_scale() == 65536 / 4 and resumed.state_dict() == scaler.state_dict()


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp64"])
def test_without_fp16_the_scaler_passes_everything_through(name):
    precision = choose_precision(name, CPU)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 1)).to(precision.parameter_dtype)
    optimizer, scaler = make_adamw(model, 0.01, 0.0), precision.grad_scaler()
    loss = model(torch.ones(2, 8, dtype=precision.parameter_dtype)).square().mean()
    assert scaler.scale(loss) is loss and scaler.get_scale() == 1.0 and scaler.state_dict() == {}
    before = model[0].weight.detach().clone()
    scaler.scale(loss).backward()
    gradient = model[0].weight.grad.clone()
    scaler.unscale_(optimizer)
    assert torch.equal(model[0].weight.grad, gradient)
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model[0].weight, before)
