"""All that a resume needs beside the tensors, and the signal that asks a run to stop. Used by both train scripts."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qa.errors import Stopped
from qa.training.distributed import Runtime, sum_over_ranks


@dataclass
class TrainState:
    step: int = 0  # optimizer steps done, skipped ones included
    updates: int = 0  # steps that changed the weights: what the learning rate is a function of
    skipped: int = 0  # steps in which GradScaler found an infinity
    best_f1: float | None = None  # on the held-out articles, and the step that had it
    best_step: int | None = None

    def advance(self, skipped: bool) -> None:
        self.step += 1
        self.updates += not skipped
        self.skipped += skipped


class StopSignal:
    """Ctrl-C and SIGTERM ask for a stop; all ranks agree on it at the next step's boundary."""

    def __init__(self, stop_after: int | None = None) -> None:
        """stop_after: steps of this process after which a stop is due without a signal."""
        self.requested, self.steps_left = False, stop_after or math.inf
        signal.signal(signal.SIGINT, self._request)
        signal.signal(signal.SIGTERM, self._request)

    def release(self) -> None:
        """After the last step: its checkpoint is written, so a stop need not wait for anything."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait


def agree(loss_sum: torch.Tensor, stop: StopSignal, runtime: Runtime) -> tuple[float, bool]:
    """One sum over the ranks for both: the step's loss, and whether any rank was asked to stop, or has made its steps."""
    stop.steps_left -= 1
    stop.requested |= stop.steps_left <= 0
    numbers = torch.stack([loss_sum.double(), torch.tensor(float(stop.requested), dtype=torch.float64,
                                                           device=loss_sum.device)])
    loss, num_requests = sum_over_ranks(numbers, runtime).tolist()
    return loss, num_requests > 0


def trouble(scaler: torch.amp.GradScaler, loss: float, grad_norm: float) -> str | None:
    """Why a run has to stop before this step's update reaches the weights, or None.

    Without GradScaler, a loss or gradient that is NaN or infinite. GradScaler begins at a scale of 2^16 = 65536, halves it at
    each step that overflows and skips the update, silently and for ever if the weights are NaN. A healthy run skips its first
    few steps. A scale below 1 says that a step overflowed at a scale of 1 or less: scaling down does not help. From 65536 that
    takes 17 skipped steps in a row.
    """
    if not scaler.is_enabled():
        return None if math.isfinite(grad_norm + loss) else f"loss {loss}, gradient norm {grad_norm}"
    if scaler.get_scale() < 1:
        return "gradients overflow fp16 even at a scale of 1; lower --lr, or use --precision bf16 or fp32"
    return None


def stopped_before(step: int, reason: str, question_ids: list[str], folder: Path) -> Stopped:
    """Ends the run; the weights are still those before this step."""
    kept = f"the last checkpoint in {folder} is kept" if (folder / "last").exists() else "there is no checkpoint yet"
    ids = ", ".join(dict.fromkeys(question_ids))
    return Stopped(f"stopped before the update of step {step}: {reason}; questions {ids}; {kept}")
