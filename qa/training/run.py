"""The folder of a run: opened, or resumed, and stopped in good order.

    runs/x/options.json     what makes this run this run
    runs/x/log.jsonl        one line per event
    runs/x/step-000120/     checkpoints, and `last` (see checkpoint.py)
    runs/x/model/           the product

Used by both train scripts.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qa import options as qa_options
from qa.data.squad import Example
from qa.errors import UserError
from qa.training.checkpoint import Checkpoint, check_out, load_checkpoint, write_json
from qa.training.distributed import Runtime, barrier, sum_over_ranks


def check_folder(options: Any) -> dict[str, Any] | None:
    """Whether --out can be opened or resumed with these options: asked first, before data and model are loaded.

    Returns:
        The record of the run that is there, or None.

    Raises:
        UserError: a run is there already and --resume was not given; or none is; or it is another run; or it is damaged.
    """
    folder = Path(options.out)
    record_path = folder / "options.json"
    check_out(folder)
    if not record_path.exists():
        if options.resume:
            raise UserError(f"--resume: {folder} holds no run (no options.json); start it without --resume")
        others = [name for name in ("model", "last", "log.jsonl") if (folder / name).exists()] + [
            path.name for path in folder.glob("step-*")]
        if others:  # a run would replace them
            raise UserError(f"--out {folder}: holds {others[0]!r}, but no run of ours (no options.json); choose another folder")
        return None
    if not options.resume:
        raise UserError(f"--out {folder}: already holds a run; go on with it by --resume, or choose another folder")
    try:
        recorded = json.loads(record_path.read_text(encoding="utf-8"))
        changed = qa_options.differences(options, recorded)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--resume: {record_path} is damaged ({error}); put it back, or start a new run") from None
    if changed:
        raise UserError(f"--resume: {folder} holds another run: {', '.join(changed)}; give the same options, "
                        "or choose another --out")
    return recorded


def open_run(options: Any, runtime: Runtime, examples: str) -> tuple[Path, Checkpoint | None]:
    """Create the run's folder, or load the last checkpoint of the run that is there.

    Args:
        examples: their `fingerprint`, so that a changed data file is noticed.

    Returns:
        The folder, and the checkpoint to go on from (None: start at step 0).

    Raises:
        UserError: as `check_folder`; or the examples are others.
    """
    folder = Path(options.out)
    record_path = folder / "options.json"
    recorded, checkpoint = check_folder(options), None
    if recorded is not None:
        if recorded.get("examples") != examples:
            raise UserError(f"--resume: the training examples are not those of {folder}: the data or the tokenizer has "
                            "changed; use the same, or choose another --out")
        checkpoint = load_checkpoint(folder)
        for line in checkpoint.warnings if checkpoint and runtime.is_main else ():
            print(f"warning: {line}", file=sys.stderr)
    barrier(runtime)  # nobody may create the record before everybody has looked for it
    if runtime.is_main and not record_path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(record_path, {**qa_options.record(options), "examples": examples})
    return folder, checkpoint


def fingerprint(examples: list[Example], tokens: np.ndarray) -> str:
    """A SHA-256 over what the run learns from: the questions, in order, with their answers and tokens."""
    digest = hashlib.sha256(repr([(example.id, example.answers) for example in examples]).encode())
    digest.update(tokens.tobytes())
    return digest.hexdigest()


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
