"""The state of a training run <-> disk: atomic, verified, without pickle.

    runs/x/last                          one line: "step-000120 <SHA-256 of its manifest.json>"
    runs/x/step-000120/model.safetensors, optimizer.safetensors    named tensors
                       state.json        plain JSON: counters, the state of GradScaler
                       manifest.json     the step, size and SHA-256 of each file, and its own SHA-256

The train scripts call `save_checkpoint` and, for --resume, `load_checkpoint` (through run.py).

Two promises:
1. A process killed at any instant leaves a checkpoint that loads, never older than the last one that `save_checkpoint`
   finished. It writes all files under a hidden name; one rename makes them a checkpoint; one more makes `last` name it;
   only then it deletes older ones (files.py says why this is safe).
2. One changed byte in any of these files is noticed, even a space in the manifest or a digit in `last`. Loading then
   takes the newest whole checkpoint instead, and says so.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from qa.errors import UserError
from qa.files import MANIFEST, damages, file_sha256, json_bytes, read_manifest, seal, sync, write_bytes, writing
from qa.training.distributed import Runtime, barrier
from qa.training.sharding import gather

STEP_FOLDER = re.compile(r"step-([0-9]{6,})")  # step-000120
LAST_LINE = re.compile(rb"(step-[0-9]+) ([0-9a-f]{64})\n")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    step: int
    tensors: dict[str, dict[str, Tensor]]  # file stem -> name -> tensor, on the CPU
    state: dict[str, Any]
    folder: Path
    warnings: list[str]  # one line each; none if the newest checkpoint is whole


def save_checkpoint(run: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, keep: int,
                    runtime: Runtime) -> None:
    """Save `step` and delete all but the `keep` newest steps. All ranks call this; rank 0 writes.

    tensors: file stem -> name -> tensor, on any device: {"model": {...}} becomes model.safetensors. state: plain JSON.
    """
    tensors = {stem: gather(named, runtime) for stem, named in tensors.items()}
    if runtime.is_main:
        with writing(run):
            run.mkdir(parents=True, exist_ok=True)
            for leftover in (*run.glob(".step-*.tmp"), *run.glob(".last.*.tmp")):  # of a process that was killed
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            # A run whose newest checkpoints were damaged was resumed from an older one: it makes these steps again.
            _delete([folder for other, folder in _step_folders(run) if other >= step])
            _write(run, step, tensors, state)
            _delete([folder for _, folder in _step_folders(run)[keep:]])
    barrier(runtime)  # if a rank ended now, torchrun would kill rank 0 while it writes


def _write(run: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
    folder = run / f"step-{step:06d}"
    temporary = run / f".{folder.name}.tmp"
    temporary.mkdir()
    for stem, named in tensors.items():
        save_file(named, temporary / f"{stem}.safetensors")
    (temporary / "state.json").write_bytes(json_bytes(state))
    manifest = seal(temporary, step)
    temporary.rename(folder)
    sync(run)
    write_bytes(run / "last", f"{folder.name} {hashlib.sha256(manifest).hexdigest()}\n".encode())


def _delete(folders: list[Path]) -> None:
    for folder in folders:
        hidden = folder.with_name(f".{folder.name}.tmp")  # half deleted, it must not look like a checkpoint
        folder.rename(hidden)
        shutil.rmtree(hidden)


def _step_folders(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all checkpoints, whole or not, newest first."""
    matches = [(STEP_FOLDER.fullmatch(path.name), path) for path in run.iterdir() if path.is_dir()]
    return sorted(((int(name[1]), path) for name, path in matches if name), reverse=True)


def load_checkpoint(run: Path) -> Checkpoint | None:
    """Load the checkpoint that `last` names; if it or `last` is damaged, the newest whole one, with warnings.

    Returns None if nothing was ever saved in `run`.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """
    folders = [folder for _, folder in _step_folders(run)] if run.is_dir() else []
    if not folders and not (run / "last").exists():
        return None
    warnings: list[str] = []
    try:
        newest = _named_by_last(run, folders)
        folders.sort(key=lambda folder: folder != newest)  # to the front; the others keep their order
    except (ValueError, OSError) as error:
        warnings.append(f"{run / 'last'}: {getattr(error, 'strerror', None) or error}")
    for folder in folders:
        found = _damages(folder)
        if not found:
            return _read(folder, [*warnings, f"{run}: going on from {folder.name}"] if warnings else [])
        warnings += found
    raise UserError(f"{run}: expected a checkpoint to go on from, found none that is whole "
                    f"({'; '.join(warnings)}); restore one from a copy, or train anew into another --out")


def _named_by_last(run: Path, folders: list[Path]) -> Path:
    """The folder that `last` names. The SHA-256 in `last` shows if a damaged digit names another step."""
    line = LAST_LINE.fullmatch((run / "last").read_bytes())
    if not line:
        raise ValueError("damaged: expected one line, a step folder and a SHA-256")
    folder = run / line[1].decode()
    if folder not in folders:
        raise ValueError(f"names {folder.name}, which is not there")
    manifest = folder / MANIFEST
    if manifest.is_file() and file_sha256(manifest) != line[2].decode():
        raise ValueError(f"does not fit {folder.name}/manifest.json: one of the two is damaged")
    return folder


def _damages(folder: Path) -> list[str]:
    """Those that files.py finds; also a manifest of another step than the folder's name says."""
    manifest = read_manifest(folder)
    if manifest is not None and folder.name != f"step-{manifest['step']:06d}":
        return [f"{folder / MANIFEST}: belongs to step {manifest['step']}"]
    return damages(folder)


def _read(folder: Path, warnings: list[str]) -> Checkpoint:
    # load_file only maps the file. A copy is safe from later changes to the file, and it is aligned in memory
    # like the tensors of an uninterrupted run: matrix products may round differently on unaligned memory.
    tensors = {path.stem: {name: tensor.clone() for name, tensor in load_file(path).items()}
               for path in folder.glob("*.safetensors")}
    state = json.loads((folder / "state.json").read_bytes())
    return Checkpoint(read_manifest(folder)["step"], tensors, state, folder, warnings)
