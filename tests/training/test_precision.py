"""Number formats: what autocast computes in, what `auto` takes, and a GradScaler that skips what overflows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qa.training.precision as precision_module
from qa.training.distributed import Runtime
from qa.training.optim import make_adamw
from qa.training.precision import Precision, base_dtype, choose_precision, time_products

CPU = Runtime(0, 1, torch.device("cpu"))
GPU = Runtime(0, 1, torch.device("cuda"))
SHAPE = (384, 1536)  # MiniLM's feed-forward layer


@pytest.mark.parametrize("fp32_ms, bf16_ms, expected, ratio", [
    (6, 10, "fp32", "0.60"), (129, 100, "fp32", "1.29"), (130, 100, "bf16", "1.30"), (23, 10, "bf16", "2.30")])
def test_auto_on_a_cpu_takes_bf16_where_it_is_1_3_times_as_fast(fp32_ms, bf16_ms, expected, ratio, monkeypatch):
    """Whatever it says of its instructions: an Intel with avx512_bf16 but without AMX gave 0.6, AMD's Zen 4 gave 2.3."""
    monkeypatch.setattr(precision_module, "time_products", lambda *shape: (fp32_ms, bf16_ms))
    precision = choose_precision("auto", CPU, *SHAPE)
    assert precision == Precision(expected, "cpu")
    assert precision.reason == f"{expected}: a product [64, 384] x [384, 1536] is {ratio} times as fast in bf16 as in fp32 here"


@pytest.mark.parametrize("fp32_ms, bf16_ms, num_tokens", [
    # of a product of 64 tokens; the slower type's must be over 4 ms: 512 tokens take 8 * 0.6 = 4.8 ms
    (0.6, 0.3, 512), (0.3, 0.6, 512), (0.001, 0.001, 4096), (0.3, 30, 64)])
def test_a_product_grows_until_it_takes_milliseconds(fp32_ms, bf16_ms, num_tokens, monkeypatch):
    tried = []

    def times(num_tokens, hidden_size, intermediate_size):
        tried.append(num_tokens)
        assert (hidden_size, intermediate_size) == SHAPE
        return fp32_ms * 1e-3 * num_tokens / 64, bf16_ms * 1e-3 * num_tokens / 64

    monkeypatch.setattr(precision_module, "time_products", times)
    assert f"[{num_tokens}, 384]" in choose_precision("auto", CPU, *SHAPE).reason
    assert tried == [tokens for tokens in (64, 128, 256, 512, 1024, 2048, 4096) if tokens <= num_tokens]


def test_products_are_timed_and_leave_the_threads_as_they_were():
    num_threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert all(0 < seconds < float("inf") for seconds in time_products(64, 8, 16))
    assert torch.get_num_threads() == num_threads and torch.equal(torch.get_rng_state(), state)


def test_a_slow_first_product_does_not_decide(monkeypatch):
    """A program's first product takes longer than all others: here 0.2 s in fp32, later 0.01 s, and bf16 0.02 s."""
    now, products = [0.0], []

    def linear(tokens, weight):
        now[0] += 0.02 if tokens.dtype == torch.bfloat16 else 0.01 if products else 0.2
        products.append(tokens.dtype)

    monkeypatch.setattr(precision_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(nn.functional, "linear", linear)
    assert time_products(64, 8, 16) == (pytest.approx(0.01), pytest.approx(0.02))
    assert len(products) == 6  # three tries of each, since they take long


def test_this_machines_auto_can_be_computed():
    precision = choose_precision("auto", CPU, 8, 16)
    assert precision.name in ("fp32", "bf16")  # fp16 on no CPU
    with precision.autocast():
        assert nn.Linear(4, 4)(torch.ones(1, 4)).isfinite().all()


@pytest.mark.parametrize("native", [True, False])
def test_auto_on_a_gpu_does_not_take_emulated_bf16(native, monkeypatch):
    """As on T4 and V100, where is_bf16_supported() is true all the same. LLaMA's frozen weights are held in the same type."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr(precision_module, "time_products", lambda *shape: pytest.fail("measured on the CPU"))
    expected = "bf16" if native else "fp16"
    precision = choose_precision("auto", GPU, *SHAPE)
    assert precision == Precision(expected, "cuda") and precision.reason.startswith(f"{expected}: this GPU")
    assert base_dtype("auto", "auto", GPU.device) == (torch.bfloat16 if native else torch.float16)


@pytest.mark.parametrize("name, precision, device, expected", [
    ("auto", "auto", CPU, torch.float32), ("auto", "bf16", CPU, torch.float32), ("bf16", "fp32", CPU, torch.bfloat16),
    ("fp16", "fp64", CPU, torch.float64), ("auto", "fp64", CPU, torch.float64), ("auto", "fp32", GPU, torch.float32),
    ("auto", "fp16", GPU, torch.float16), ("fp32", "bf16", GPU, torch.float32), ("fp16", "auto", GPU, torch.float16)])
def test_frozen_weights_are_held_in_half_on_a_gpu_alone(name, precision, device, expected):
    """The named type is taken everywhere; in fp64 all is fp64."""
    assert base_dtype(name, precision, device.device) == expected


@pytest.mark.parametrize("name, computed, stored", [
    ("fp32", torch.float32, torch.float32), ("bf16", torch.bfloat16, torch.float32),
    ("fp16", torch.float16, torch.float32), ("fp64", torch.float64, torch.float64)])
def test_autocast_computes_in_the_named_type(name, computed, stored):
    precision = choose_precision(name, CPU, *SHAPE)
    assert precision == Precision(name, "cpu") and precision.parameter_dtype == stored
    assert precision.reason == f"{name}: asked for by --precision"
    linear = nn.Linear(3, 3).to(stored)
    for _ in range(2):  # a fresh context each time
        with precision.autocast():
            assert linear(torch.ones(1, 3, dtype=stored)).dtype == computed
    assert linear(torch.ones(1, 3, dtype=stored)).dtype == stored
    assert precision.grad_scaler().is_enabled() == (name == "fp16")


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
    precision = Precision("fp16", "cpu")
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
    precision = Precision("fp16", "cpu")
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
    precision = Precision(name, "cpu")
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
