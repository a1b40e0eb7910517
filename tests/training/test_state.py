"""What a resume needs, and when a run has to stop.

One worked case: of three steps the second is skipped: step 3, updates 2, skipped 1.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qa.training.precision import Precision
from qa.training.state import TrainState, stopped_before, trouble


def test_worked_case():
    state = TrainState()
    for skipped in (False, True, False):
        state.advance(skipped)
    assert (state.step, state.updates, state.skipped) == (3, 2, 1)


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (1.0, math.inf), (-math.inf, 1.0)])
def test_without_a_scaler_what_is_not_finite_stops_the_run_and_says_what_is_kept(loss, norm, tmp_path):
    scaler = Precision("bf16", "cpu").grad_scaler()
    reason = trouble(scaler, loss, norm)
    assert reason == f"loss {loss}, gradient norm {norm}" and trouble(scaler, 1.0, 2.0) is None
    assert str(stopped_before(7, reason, ["a", "b", "a"], tmp_path)) == (
        f"stopped before the update of step 7: {reason}; questions a, b; there is no checkpoint yet")
    (tmp_path / "last").write_text("step-000006")
    assert str(stopped_before(7, reason, ["a"], tmp_path)).endswith(f"the last checkpoint in {tmp_path} is kept")


def until_stopped(scaler: torch.amp.GradScaler, overflows: list[bool]) -> int | None:
    """Steps made when `trouble` stops the loop, with a NaN gradient in those that overflow; None: it never does."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    for number, overflow in enumerate(overflows, start=1):
        scaler.scale(parameter.sum()).backward()
        if overflow:
            parameter.grad.fill_(torch.nan)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if (reason := trouble(scaler, 1.0, 1.0)) is not None:
            assert "scale of 1;" in reason and "bf16" in reason and "\n" not in reason
            return number
    return None


@pytest.mark.parametrize("first_scale, num_steps", [(65536, 17), (1, 1), (2**20, 21)])
def test_gradients_that_always_overflow_stop_the_run_once_no_scale_is_left(first_scale, num_steps):
    """2^16 is 1 after 16 halvings. That the 17th step overflows too shows that scaling down cannot help."""
    assert until_stopped(torch.amp.GradScaler("cpu", init_scale=first_scale), [True] * 40) == num_steps
    assert Precision("fp16", "cpu").grad_scaler().get_scale() == 65536


@pytest.mark.parametrize("num_overflows", [0, 3, 5, 16])
def test_a_scale_that_settles_does_not_stop_the_run(num_overflows):
    assert until_stopped(Precision("fp16", "cpu").grad_scaler(), [True] * num_overflows + [False] * 40) is None


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp64"])
def test_a_run_that_scales_nothing_has_no_scale_to_lose(name):
    assert trouble(Precision(name, "cpu").grad_scaler(), 1.0, 1.0) is None
