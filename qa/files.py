"""Files and folders on disk: written whole or not at all, and verified.

    read_json                  a file of the user's; what is wrong with it is a UserError
    write_json, write_bytes    whoever reads the file, even after a crash, finds the old content or the new, never a mixture
    seal, damages              manifest.json in a folder: the size and the SHA-256 of each file, and its own SHA-256
    replace_folder             a whole folder in the place of an earlier one

os.replace is atomic for readers, but does not say when bytes and names reach the disk. So each file is synced before it is
renamed, and its folder after that (Pillai et al. 2014, "All File Systems Are Not Created Equal", OSDI).
Used by: training/ (checkpoints, the model), evaluation/results.py, llama/adapter.py, llama/model.py; data/squad.py and
evaluation/predictions_file.py (`read_json`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qa.errors import UserError

MANIFEST = "manifest.json"


def check_out(folder: Path | str, flag: str = "--out") -> None:
    """Refuse a folder that files cannot be written to, before anything is computed."""
    for path in (Path(folder), *Path(folder).absolute().parents):
        try:
            path.stat()
            kind = "is a file" if not path.is_dir() else "" if os.access(path, os.W_OK) else "may not be written"
        except (FileNotFoundError, NotADirectoryError):
            if not path.is_symlink():
                continue
            kind = "is a link to nothing"
        except (OSError, ValueError) as error:  # a link to itself, too long a name, a NUL in it
            kind = f"is no name for a folder ({getattr(error, 'strerror', error)})"
        if kind:
            raise UserError(f"{flag} {folder}: {path} {kind}; expected a folder or a new name")
        return


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """What fails while files are written, such as a full disk, is a UserError. The Rust libraries raise types of their own."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        raise UserError(f"{place} cannot be written ({getattr(error, 'strerror', None) or error}); earlier files are whole: "
                        "make room, and give the same command, with --resume if it trains") from error


def read_json(path: Path | str, expected: str, **options: Any) -> Any:
    """The JSON of a file that the user named. `expected` says what it should hold; `options` are those of json.loads."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from None
    if not content.strip():
        raise UserError(f"{path}: the file is empty; expected {expected}")
    try:
        return json.loads(content, **options)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); expected {expected}") from None


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """JSON in UTF-8. NaN and infinity, which JSON does not have, are a ValueError."""
    text = json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    return text.encode("utf-8", errors="backslashreplace")  # half a surrogate pair has no UTF-8: it becomes its JSON escape


def write_bytes(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # in the same folder: os.replace works within one file system
    try:
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_readable(folder: Path) -> None:
    """Let others read the weights, as they may read other files: safetensors writes them for the owner only."""
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)


def seal(folder: Path, step: int, **more: str) -> bytes:
    """Write the manifest of all files in `folder`, with `more` in it, and wait until all is on the disk. Returns its bytes."""
    make_readable(folder)
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths}
    manifest = _signed({"step": step, **more, "files": files})
    (folder / MANIFEST).write_bytes(manifest)
    for path in [*paths, folder / MANIFEST, folder]:
        sync(path)
    return manifest


def read_manifest(folder: Path) -> dict | None:
    """The manifest; None if it is missing, or differs in any byte from what `seal` writes."""
    try:
        raw = (folder / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        del manifest["sha256"]
        return manifest if _signed(manifest) == raw else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def damages(folder: Path) -> list[str]:
    """One line for each damaged, missing or foreign file of a sealed folder."""
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{folder / MANIFEST}: missing or damaged"]
    expected, found = manifest["files"], []
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    for name in sorted(present | expected.keys()):
        path = folder / name
        try:
            if name not in expected:
                found.append(f"{path}: not in {MANIFEST}, so no part of what was saved")
            elif (num_bytes := path.stat().st_size) != expected[name]["bytes"]:
                found.append(f"{path}: has {num_bytes} bytes, expected {expected[name]['bytes']}")
            elif file_sha256(path) != expected[name]["sha256"]:
                found.append(f"{path}: damaged, its SHA-256 is not the one in {MANIFEST}")
        except OSError as error:  # missing, not readable, or the disk fails
            found.append(f"{path}: cannot be read ({error.strerror})")
    return found


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`. A folder cannot be renamed onto another one, so the old one is renamed first."""
    aside = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        folder.rename(aside)
    new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def finish_replacing(folder: Path) -> None:
    """If `replace_folder` was killed between its two renames, put the old folder back; if after them, delete it."""
    aside = folder.with_name(f".{folder.name}.old")
    if aside.exists() and folder.exists():
        shutil.rmtree(aside)
    elif aside.exists():
        aside.rename(folder)


def _signed(content: dict) -> bytes:
    return json_bytes({**content, "sha256": hashlib.sha256(json_bytes(content)).hexdigest()})
