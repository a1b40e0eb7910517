"""What reading needs beside the weights: lengths, prompt, decoder, no-answer threshold. All in one `ReadSettings`.

`resolve` decides each value: what the user typed, else what was saved with the model, else the default of the family. A run
writes its settings beside its weights, in model/qa.json. Used by: qa/reader.py (for the two readers), the train scripts,
training/product.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qa.data.squad import SquadData
from qa.schema import FLAG, OBJECT, number, one_of, optional, read_object, whole

FILE = "qa.json"


@dataclass(frozen=True)
class ReadSettings:
    # lengths, in tokens
    max_length: int | None  # BERT: of a window; LLaMA: of prompt and answer (None: the model's context, at most 4,096)
    overlap: int  # shared by two neighbouring windows, or pieces of a passage
    max_answer_length: int  # LLaMA: the end token included
    # answers
    num_best: int  # candidates for a question
    na_threshold: float | None = None  # v2.0: a question with a higher no-answer score gets no answer; None: 0
    temperature: float | None = None  # of the confidences (evaluation/calibration.py); None: they are the model's own
    is_v2: bool | None = None  # whether the model has learnt to give no answer; None: unknown
    # LLaMA
    prompt: dict[str, Any] | None = None  # PromptTemplate.settings()
    decode: str = "greedy"
    max_expansions: int | None = None  # limit for exact decoding; None: no limit

    def may_refuse(self, data: SquadData) -> bool:
        """Whether the model may give no answer: the data decides or, if it holds no answers, the model."""
        return data.is_v2 if data.has_answers or self.is_v2 is None else self.is_v2


DEFAULTS = {
    "bert": ReadSettings(max_length=384, overlap=128, max_answer_length=30, num_best=20),
    "llama": ReadSettings(max_length=None, overlap=128, max_answer_length=48, num_best=1),
}


LOWEST = {"max_length": 8, "overlap": 0, "max_answer_length": 1, "num_best": 1, "max_expansions": 0, "step": 0}
SCHEMA = {name: optional(whole(low)) for name, low in LOWEST.items()} | {
    "na_threshold": optional(number(-1e38)), "is_v2": optional(FLAG), "prompt": optional(OBJECT),
    "temperature": optional(number(1e-3, 1e3)), "decode": optional(one_of("greedy", "exact"))}


def resolve(family: str, typed_values: dict[str, Any], saved: dict[str, Any]) -> tuple[ReadSettings, dict[str, str]]:
    """The settings of a reader, and the source of each: "typed", "saved" or "default".

    In `typed_values` and `saved`, names of other things, and values that are None, are ignored.
    """
    values = dataclasses.asdict(DEFAULTS[family])
    sources = dict.fromkeys(values, "default")
    for source, given in (("saved", saved), ("typed", typed_values)):
        for name in values:
            if given.get(name) is not None:
                values[name], sources[name] = given[name], source
    return ReadSettings(**values), sources


def read_settings(folder: Path) -> dict[str, Any]:
    """The contents of qa.json: settings, and the `step` of the weights beside it; {} for a folder that is not ours."""
    path = folder / FILE
    advice = "the settings of a model; delete it to evaluate with the options given"
    return read_object(path, advice, SCHEMA) if path.is_file() else {}
