"""What reading needs beside the weights: lengths, prompt, decoder, no-answer threshold. One typed `ReadSettings`.

Each value is what the user typed, else what the checkpoint says, else the family's default; `resolve` decides so, once,
and remembers the source of each. A run writes its settings beside its weights, in model/qa.json, as they are.
Used by: reader.py (which hands them to the two readers), the train scripts, training/product.py.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qa.data.squad import SquadData
from qa.errors import UserError

FILE = "qa.json"


@dataclass(frozen=True)
class ReadSettings:
    # lengths, in tokens
    max_length: int | None  # a window (BERT); prompt and answer (LLaMA; None: the model's context, at most 4,096)
    overlap: int  # that two windows, or two pieces of a passage, share
    max_answer_length: int  # LLaMA: the end token included
    # answers
    num_best: int  # candidates of a question
    na_threshold: float | None = None  # v2.0: no answer above this no-answer score; None: 0
    is_v2: bool | None = None  # whether the model has learnt to give no answer; None: not known
    # LLaMA
    prompt: dict[str, Any] | None = None  # PromptTemplate.settings()
    decode: str = "greedy"
    max_expansions: int | None = None  # a budget for exact decoding; None: no limit

    def may_refuse(self, data: SquadData) -> bool:
        """Whether "no answer" is one of the answers: the data decides; where it has no answers itself, the model does."""
        return data.is_v2 if data.has_answers or self.is_v2 is None else self.is_v2


DEFAULTS = {
    "bert": ReadSettings(max_length=384, overlap=128, max_answer_length=30, num_best=20),
    "llama": ReadSettings(max_length=None, overlap=128, max_answer_length=48, num_best=1),
}


def resolve(family: str, typed_values: dict[str, Any], saved: dict[str, Any]) -> tuple[ReadSettings, dict[str, str]]:
    """The settings of an evaluation, and the source of each: "typed", "checkpoint" or "default".

    Args:
        typed_values, saved: name -> value; names that are no settings, and values that are None, are passed over.
    """
    values, sources = dataclasses.asdict(DEFAULTS[family]), dict.fromkeys(_NAMES, "default")
    for source, given in (("checkpoint", saved), ("typed", typed_values)):
        for name in _NAMES:
            if given.get(name) is not None:
                values[name], sources[name] = given[name], source
    return ReadSettings(**values), sources


def save_settings(settings: ReadSettings, step: int) -> dict[str, Any]:
    """The contents of qa.json. `step`: of the weights beside it."""
    return {**dataclasses.asdict(settings), "step": step}


def read_settings(folder: Path) -> dict[str, Any]:
    """The contents of qa.json; {} for a folder that is not ours."""
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it to evaluate with the options given") from None


_NAMES = [field.name for field in dataclasses.fields(ReadSettings)]
