"""The product of a run: `runs/x/model/`, a folder in the format of transformers or peft, which other tools load too.

    the weights, the tokenizer    as the family writes them (bert/model.py, llama/adapter.py)
    qa.json                       what reading needs (settings.py)
    README.md                     the model card (card.py)
    manifest.json                 size and SHA-256 of each file

A new product is written under a hidden name, then takes the place of the earlier one. Each train script makes one
`Product`; evaluator.py saves and restores it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qa.errors import UserError
from qa.files import MANIFEST, damages, file_sha256, finish_replacing, read_manifest, replace_folder, seal, write_json, writing
from qa.settings import FILE, ReadSettings, read_settings
from qa.training.distributed import Runtime, barrier


def inspect(folder: Path) -> list[str]:
    """Warnings about files of a product that changed since its run wrote it; none for a folder that is no product.

    Raises:
        UserError: the weights changed. (Other files may: a user may write another threshold into qa.json.)
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
    write: Callable[[Path, dict[str, Tensor]], None]  # `whole_weights` and tokenizer, into a folder that exists
    read: Callable[[Path], None]  # the weights, back into the model
    card: Callable[[int, dict[str, Any], dict[str, Any]], str]  # (step, chosen, scores) -> text of README.md
    settings: ReadSettings
    runtime: Runtime
    whole_weights: Callable[[], dict[str, Tensor]] = dict  # BERT's; all ranks call it, for each may hold a part only

    def save(self, step: int, chosen: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Write the product of `step`. All ranks call this; rank 0 writes.

        chosen: {"na_threshold": ..., "temperature": ...}, what held-out articles decided; {} without any.
        """
        weights = self.whole_weights()
        if self.runtime.is_main:
            temporary = self.folder.with_name(f".{self.folder.name}.tmp")
            with writing(self.folder):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                self.write(temporary, weights)
                write_json(temporary / FILE, {**asdict(self.settings), **chosen, "step": step})
                (temporary / "README.md").write_text(self.card(step, chosen, metrics), encoding="utf-8", errors="replace")
                seal(temporary, step, run=self._run())
                replace_folder(temporary, self.folder)
        barrier(self.runtime)

    def check(self, best_step: int | None) -> None:
        """At the start of a resume: finish a replacement that was cut short, and check the best product so far.

        best_step: step of the best weights so far, which `restore` loads at the end; None: it will not be called.

        Raises:
            UserError: the product is damaged or missing, or belongs to another run.
        """
        if self.runtime.is_main:
            finish_replacing(self.folder)
        barrier(self.runtime)
        if best_step is None:
            return
        if lines := damages(self.folder):
            raise UserError(f"--resume: the best model so far is damaged ({lines[0]}); put {self.folder} back from a copy, or "
                            "train anew into another --out")
        manifest = read_manifest(self.folder)  # of a later step if the run was killed before that step's checkpoint
        if manifest.get("run") != self._run() or manifest["step"] < best_step:
            raise UserError(f"--resume: {self.folder} holds another run's weights, or not the best of this run, those of step "
                            f"{best_step}; put them back from a copy, or train anew into another --out")

    def _run(self) -> str:
        """The run's identity, written into the manifest."""
        return file_sha256(self.folder.with_name("options.json"))

    def restore(self) -> tuple[int, dict[str, Any]]:
        """Load the saved weights back; returns their step and what was chosen for them."""
        self.read(self.folder)
        settings = read_settings(self.folder)
        return settings["step"], {name: settings.get(name) for name in ("na_threshold", "temperature")}
