"""What a resume needs besides the tensors, and the reasons for which a run stops early. Used by both train scripts."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qa.errors import Stopped
from qa.training.distributed import Runtime, sum_over_ranks
from qa.training.sharding import whole


@dataclass
class TrainState:
    step: int = 0  # optimizer steps done, skipped ones included
    updates: int = 0  # steps that changed the weights; the learning rate is a function of this number
    skipped: int = 0  # steps in which GradScaler found an infinity
    best_f1: float | None = None  # on the held-out articles
    best_step: int | None = None  # the step that had it

    def advance(self, skipped: bool) -> None:
        self.step += 1
        self.updates += not skipped
        self.skipped += skipped


SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # Windows has not all


class StopSignal:
    """Ctrl-C, SIGTERM and SIGUSR1 (SLURM's warning) request a stop, of all ranks together, after their step (see `agree`)."""

    def __init__(self, stop_after: int | None = None) -> None:
        """stop_after: number of steps of this process after which it stops without a signal."""
        self.requested, self.steps_left = False, stop_after or math.inf
        for name in SIGNALS:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._request)

    def release(self) -> None:
        """Called after the last step: its checkpoint is written, so from now on a signal ends the process at once."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for name in SIGNALS[1:]:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_DFL)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends the process at once


def agree(loss_sum: torch.Tensor, grad_norm: torch.Tensor, stop: StopSignal, runtime: Runtime) -> tuple[float, float, bool]:
    """Sum two numbers over the ranks: the step's loss (float64), and how many ranks have a stop request.

    Returns the loss of the global batch, the gradient's norm, which every rank has already, and whether to stop after this
    step. This is where a step waits for the GPU, once.
    """
    stop.steps_left -= 1
    stop.requested |= stop.steps_left <= 0
    summed = sum_over_ranks(torch.stack([loss_sum, loss_sum.new_tensor(stop.requested)]), runtime)
    loss, num_requests, norm = torch.cat([summed, whole(grad_norm)[None].to(summed)]).tolist()
    return loss, norm, num_requests > 0


def trouble(scaler: torch.amp.GradScaler, loss: float, grad_norm: float) -> str | None:
    """Why the run must stop before this step's update, or None.

    Without GradScaler: the loss or the gradient is NaN or infinite. GradScaler (fp16) begins at a scale of 2^16 = 65536. When
    a step's gradients overflow, it skips the update and halves the scale; a healthy run skips its first few steps. A scale
    below 1 means that gradients overflowed even at a scale of 1 (at the start: after 17 skipped steps): the run cannot recover.
    """
    if not scaler.is_enabled():
        return None if math.isfinite(grad_norm + loss) else f"loss {loss}, gradient norm {grad_norm}"
    if scaler.get_scale() < 1:
        return "gradients overflow fp16 even at a scale of 1; lower --lr, or use --precision bf16 or fp32"
    return None


def stopped_before(step: int, reason: str, question_ids: list[str], folder: Path) -> Stopped:
    """The exception that ends the run; `step`'s update has not been made."""
    kept = f"the last checkpoint in {folder} is kept" if (folder / "last").exists() else "there is no checkpoint yet"
    ids = ", ".join(dict.fromkeys(question_ids))
    return Stopped(f"stopped before the update of step {step}: {reason}; questions {ids}; {kept}")
