"""The folder of a run: named, opened or resumed.

    runs/x/options.json     the options, versions and examples of the run: a resume must have the same
    runs/x/train_questions.json   the ids of the questions that it learns from
    runs/x/environment.json the command and the commit of each process that worked on it
    runs/x/log.jsonl        one line per event (log.py)
    runs/x/step-000120/     checkpoints, and `last` (checkpoint.py)
    runs/x/model/           the product (product.py)
    runs/x/evaluation/      the development data, scored at the end (evaluation/results.py)
    runs/x/finished.json    written at the end, with the seconds that all its processes took

Used by both train scripts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import re
import sys
import time
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from qa.data.squad import Passage
from qa.errors import UserError
from qa.evaluation.results import environment
from qa.files import check_out, write_json
from qa.options import TrainOptions, differences
from qa.schema import TEXT, one_of, optional, read_object
from qa.training.checkpoint import Checkpoint, load_checkpoint
from qa.training.distributed import Runtime, barrier, gather_objects
from qa.training.precision import AUTOCAST_DTYPES, Precision
from qa.training.state import TrainState

RUNS = Path("runs")
RECORD = {"kind": optional(TEXT), "examples": optional(TEXT), "resolved_precision": optional(one_of(*AUTOCAST_DTYPES))}

try:
    import fcntl
except ImportError:  # Windows: a run is not locked there
    fcntl = None

_locked: set[Path] = set()  # the folders of this process's runs


def find_run(options: TrainOptions, runtime: Runtime) -> TrainOptions:
    """Decide which folder the run has, before data and model are loaded.

    Returns the options with `out` filled in. A resumed run also keeps the `precision` that it began with, on any machine.

    Raises:
        UserError: --out already holds a run and --resume was not given; or --resume finds no run, another run or a damaged one.
    """
    if options.resume == "auto":  # rank 0 decides
        begun = gather_objects((Path(options.out) / "options.json").exists(), runtime)[0]
        options = replace(options, resume="yes" if begun else None)
    if options.out is None:
        out = _newest_unfinished(options.kind) if options.resume else _new_folder(options)
        out = gather_objects(out, runtime)[0]  # rank 0 decides
        if out is None:
            raise UserError(f"--resume: no unfinished run of this script under {RUNS}/; name it by --out, or start one")
        options = replace(options, out=out)
        if runtime.is_main and options.resume:
            print(f"going on with {out}")
    recorded = check_run_folder(options)
    if recorded is None:
        return options
    if (Path(options.out) / "finished.json").exists():
        if runtime.is_main:
            print(f"the run in {options.out} is already finished; evaluate it with evaluate.py --ckpt {options.out}")
        raise SystemExit(0)
    lock_run(Path(options.out), runtime)
    first = recorded.get("resolved_precision") or options.precision
    if options.precision not in ("auto", first):
        raise UserError(f"--precision {options.precision}: the run in {options.out} computes in {first}; leave the flag "
                        "out, or choose another --out")
    return replace(options, precision=first)


def _new_folder(options: TrainOptions) -> str:
    """runs/bert-bert-base-uncased-squad; if that exists, the same name with a number."""
    parts = [options.kind, *(Path(value).stem if Path(value).suffix in (".json", ".gguf") else Path(value).name
                             for value in (options.model.removeprefix("pypi:"), options.train_data))]
    name = re.sub(r"[^\w.-]+", "-", "-".join(parts))[:150]
    numbered = (RUNS / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
    return str(next(folder for folder in numbered if not folder.exists()))


def _newest_unfinished(kind: str) -> str | None:
    """Of this script's unfinished runs under runs/, the folder of the one that was active last."""
    runs = []
    for record in RUNS.glob("*/options.json"):
        try:
            is_ours = json.loads(record.read_bytes()).get("kind") == kind
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if is_ours and not (record.parent / "finished.json").exists():
            active = max(path.stat().st_mtime for path in (record, record.parent / "log.jsonl") if path.exists())
            runs.append((active, str(record.parent)))
    return max(runs)[1] if runs else None


def check_run_folder(options: TrainOptions) -> dict[str, Any] | None:
    """Check that these options can start a run in --out, or resume the one there; returns its record, or None."""
    folder = Path(options.out)
    record_path = folder / "options.json"
    check_out(folder)
    for name in ("log.jsonl", "last", "model"):
        if (folder / name).is_dir() != (name == "model") and (folder / name).exists() or (folder / name).is_symlink():
            kind = "folder" if name == "model" else "file"
            raise UserError(f"--out {folder}: {name!r} in it is no {kind} that a run made; remove it, or choose another --out")
    if not record_path.exists():
        if options.resume:
            raise UserError(f"--resume: {folder} holds no run (no options.json); start it without --resume")
        others = [path.name for pattern in ("model", "last", "log.jsonl", "step-*") for path in folder.glob(pattern)]
        if others:  # a run would replace them
            raise UserError(f"--out {folder}: holds {others[0]!r}, but no run of ours (no options.json); choose another folder")
        return None
    if not options.resume:
        raise UserError(f"--out {folder}: already holds a run; go on with it by --resume, or choose another folder")
    recorded = read_object(record_path, "the record of a run; put it back, or start a new run", RECORD)
    if changed := differences(options, recorded):
        raise UserError(f"--resume: {folder} holds another run: {', '.join(changed)}; give the same options, "
                        "or choose another --out")
    return recorded


def lock_run(folder: Path, runtime: Runtime) -> None:
    """Refuse a folder in which another process trains. The lock is the kernel's: it ends when its process ends in any way."""
    is_taken = False
    if fcntl and runtime.is_main and folder.resolve() not in _locked:
        try:
            fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)  # never closed
            _locked.add(folder.resolve())
        except OSError as error:  # another one: a file system without locks
            is_taken = isinstance(error, BlockingIOError)
    if gather_objects(is_taken, runtime)[0]:
        raise UserError(f"--out {folder}: another process is training in it; wait for its end, or choose another --out")


def open_run(options: TrainOptions, runtime: Runtime, precision: Precision, data_sha256: str,
             question_ids: list[str]) -> tuple[Path, Checkpoint | None]:
    """Create the run's folder; with --resume, load its last checkpoint instead.

    options: as `find_run` returned them. data_sha256: what `fingerprint` returned. question_ids: those that the run learns
    from. Returns the folder, and the checkpoint to go on from (None: start at step 0).

    Raises:
        UserError: the run was begun with other examples, or no checkpoint is whole.
    """
    folder, checkpoint = Path(options.out), None
    if options.resume:
        if json.loads((folder / "options.json").read_bytes()).get("examples") != data_sha256:
            raise UserError(f"--resume: the training examples are not those of {folder}: the data or the tokenizer has "
                            "changed; use the same, or choose another --out")
        checkpoint = load_checkpoint(folder)
        if runtime.is_main:
            for line in checkpoint.warnings if checkpoint else ():
                print(f"warning: {line}", file=sys.stderr)
            print(f"resumed from step {checkpoint.step}" if checkpoint else "no checkpoint yet: starting again from step 0")
    barrier(runtime)  # rank 0 may create the record only after every rank has seen that there is none
    if not options.resume:
        if runtime.is_main:
            folder.mkdir(parents=True, exist_ok=True)
        lock_run(folder, runtime)
    if runtime.is_main and not options.resume:
        print(f"the run is in {folder}")
        write_json(folder / "train_questions.json", question_ids)
        write_json(folder / "options.json", {
            **asdict(options), "kind": options.kind, "examples": data_sha256, "resolved_precision": precision.name,
            "precision_reason": precision.reason, "threads": torch.get_num_threads(), "versions": versions()})
    if runtime.is_main:
        processes = _read_list(folder / "environment.json") if options.resume else []
        write_json(folder / "environment.json", [*processes, environment(runtime.began)])
    return folder, checkpoint


def finish_run(folder: Path, state: TrainState, runtime: Runtime) -> None:
    """Mark the run as finished, so that `--resume` without --out does not choose it."""
    if runtime.is_main:
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        write_json(folder / "finished.json", {"step": state.step, "time": now, "seconds": _wall_seconds(folder, now)})


def _wall_seconds(folder: Path, now: str) -> float:
    """Of all processes of the run together, each from its beginning to its last line in log.jsonl."""
    begins = [process["began"] for process in _read_list(folder / "environment.json")]
    log = (folder / "log.jsonl").read_text(encoding="utf-8") if (folder / "log.jsonl").exists() else ""
    times = re.findall(r'"time": "([\d:T-]+)"', log)
    ends = [max((time for time in times if begin <= time <= after), default=begin)
            for begin, after in itertools.pairwise(begins)] + [now]
    return sum((datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()
               for begin, end in zip(begins, ends, strict=False))


def _read_list(path: Path) -> list:
    """A list from a file of ours; [] if it is missing or damaged, as in a run of an older version."""
    try:
        return list(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return []


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "numpy": np.__version__}


def fingerprint(passages: list[Passage], tokens: np.ndarray) -> str:
    """A SHA-256 of what the run learns from: the questions in order, their answers and tokens."""
    questions = [(example.id, example.answers) for passage in passages for example in passage.examples]
    digest = hashlib.sha256(repr(questions).encode("utf-8", "backslashreplace"))
    digest.update(tokens.tobytes())
    return digest.hexdigest()
