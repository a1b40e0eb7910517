"""All that a resume needs beside the tensors, and the signal that asks a run to stop. Used by both train scripts."""

from __future__ import annotations

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
    skipped_in_a_row: int = 0
    best_f1: float | None = None  # on the held-out articles, and the step that had it
    best_step: int | None = None

    def advance(self, skipped: bool) -> None:
        self.step += 1
        self.updates += not skipped
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0


class StopSignal:
    """Ctrl-C and SIGTERM ask for a stop; all ranks agree on it at the next step's boundary."""

    def __init__(self) -> None:
        self.requested = False
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
    """One sum over the ranks for both: the step's loss, and whether any rank was asked to stop."""
    numbers = torch.stack([loss_sum.double(), torch.tensor(float(stop.requested), dtype=torch.float64,
                                                           device=loss_sum.device)])
    loss, num_requests = sum_over_ranks(numbers, runtime).tolist()
    return loss, num_requests > 0


def diverged(step: int, reason: str, folder: Path) -> Stopped:
    """fp16 only: GradScaler skips the updates of a run that has diverged, silently."""
    return Stopped(f"stopped after step {step}: {reason}; {_kept(folder)}")


def not_finite_step(step: int, loss: float, grad_norm: float, question_ids: list[str], folder: Path) -> Stopped:
    """A loss or gradient that is NaN or infinite ends the run before it reaches the weights."""
    return Stopped(f"stopped before the update of step {step}: loss {loss}, gradient norm {grad_norm}; "
                   f"questions {', '.join(dict.fromkeys(question_ids))}; {_kept(folder)}")


def _kept(folder: Path) -> str:
    return f"the last checkpoint in {folder} is kept" if (folder / "last").exists() else "there is no checkpoint"
