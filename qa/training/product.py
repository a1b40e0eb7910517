"""The product of a run, `runs/x/model/`: a folder in the ecosystem's own format, which other tools load.

    the weights, the tokenizer    as the family writes them (bert/model.py, llama/adapter.py)
    qa.json                       what reading needs (settings.py)
    README.md                     the model card (card.py)
    manifest.json                 size and SHA-256 of each file

It is written whole under a hidden name, and put in the place of the one before. Each train script makes one `Product`,
which evaluator.py saves and restores.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qa.errors import UserError
from qa.files import MANIFEST, damages, file_sha256, finish_replacing, read_manifest, replace_folder, seal, write_json
from qa.settings import FILE, ReadSettings, read_settings, save_settings
from qa.training.distributed import Runtime, barrier


def inspect(folder: Path) -> list[str]:
    """What was changed in a product since its run wrote it; nothing for a folder that is not one.

    Raises:
        UserError: the weights are not those that were written. (qa.json may be edited by hand, for another threshold.)
    """
    if not (folder / FILE).is_file() or not (folder / MANIFEST).is_file():
        return []
    lines = [line for line in damages(folder) if "no part of" not in line]
    if broken := [line for line in lines if ".safetensors" in line]:
        raise UserError(f"--ckpt: {broken[0]}; copy it again, or train anew")
    return [f"warning: changed since the run wrote it: {line}" for line in lines]


@dataclass
class Product:
    folder: Path
    write: Callable[[Path], None]  # weights and tokenizer, into a folder that exists
    read: Callable[[Path], None]  # the weights, back into the model
    card: Callable[[int, float | None, dict[str, Any]], str]  # step, threshold, scores -> README.md
    settings: ReadSettings
    runtime: Runtime

    def save(self, step: int, na_threshold: float | None, metrics: dict[str, Any]) -> None:
        """All ranks call it; rank 0 writes."""
        if self.runtime.is_main:
            temporary = self.folder.with_name(f".{self.folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            self.write(temporary)
            write_json(temporary / FILE, save_settings(replace(self.settings, na_threshold=na_threshold), step))
            (temporary / "README.md").write_text(self.card(step, na_threshold, metrics), encoding="utf-8", errors="replace")
            seal(temporary, step, run=self._run())
            replace_folder(temporary, self.folder)
        barrier(self.runtime)

    def check(self, best_step: int | None) -> None:
        """At the start of a resume: a half-done replacement is finished, and the best product so far must be whole.

        Args:
            best_step: the step of the product that `restore` will load at the end; None: it will not.

        Raises:
            UserError: its product is damaged, missing, or another one's.
        """
        if self.runtime.is_main:
            finish_replacing(self.folder)
        barrier(self.runtime)
        if best_step is None:
            return
        if lines := damages(self.folder):
            raise UserError(f"--resume: the best model so far is damaged ({lines[0]}); put {self.folder} back from a copy, or "
                            "train anew into another --out")
        manifest = read_manifest(self.folder)  # that of a later step is possible: the run was killed before a checkpoint
        if manifest.get("run") != self._run() or manifest["step"] < best_step:
            raise UserError(f"--resume: {self.folder} holds another run's weights, or not the best of this run, those of step "
                            f"{best_step}; put them back from a copy, or train anew into another --out")

    def _run(self) -> str:
        """Which run this is."""
        return file_sha256(self.folder.with_name("options.json"))

    def restore(self) -> tuple[int, float | None]:
        """Load the saved weights back; returns their step and no-answer threshold."""
        self.read(self.folder)
        settings = read_settings(self.folder)
        return settings["step"], settings["na_threshold"]
