"""The folders of a report, read and put in order: evaluations, and the systems that they are of.

An `Evaluation` is what one model answered to the questions. Runs with the same options except the seed are one `System`. The
systems that differ in nothing but the number of training questions, and the recipe for it, are a curve; they have one colour.
For example, BERT on 250 questions with 3 seeds and BERT on 1,000 with 3 seeds: 6 evaluations, 2 systems, 1 curve.

Input: folders of evaluate.py, and runs with a folder evaluation/. Used by: qa/report.py, and the other files of this folder.
Letters: N questions, S seeds.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from qa.data.squad import counted
from qa.errors import UserError
from qa.files import read_json
from qa.options import BertOptions, LlamaOptions, flag
from qa.schema import OBJECT, TEXT, check_fields, number, one_of, optional, read_object, whole

FAMILIES = {"bert": ("BERT", BertOptions), "lora": ("LoRA", LlamaOptions)}  # kind of a run: its name, its options
SIZE, RECIPE = "max_train_questions", ("lr", "epochs", "max_steps")  # in these the systems of a curve may differ
SAMPLE = ("ckpt", "data", "precision", "max_questions", "seed", "data_seed")  # typed options that make no other system
QUESTION = {"title": TEXT, "exact": number(0, 1), "f1": number(0, 1), "prediction": optional(TEXT),
            "confidence": optional(number(0, 1)), "no_answer_score": optional(number(-1e38))}
CONDITIONS = {"identity": optional(OBJECT), "ckpt": optional(TEXT), "na_threshold": optional(number(-1e38))}
RUN = {"kind": one_of(*FAMILIES), "batch_size": whole(1), "lr": number(0), "epochs": whole(1), "max_steps": optional(whole(1)),
       "model": optional(TEXT), SIZE: optional(whole(0))}


@dataclass
class Evaluation:
    folder: Path
    titles: dict[str, str]  # id -> article, in the order of the data
    answers: list[str | None]  # [N]
    scores: dict[str, np.ndarray]  # exact, f1 (0 to 1), confidence, no_answer_score (nan: unknown): [N] each
    conditions: dict[str, Any]
    run: Path | None  # the folder of the run that made the model, if there is one
    options: dict[str, Any]  # of the run

    def settings(self) -> dict[str, Any]:
        """What its command set otherwise than the model has it: {"decode": "exact"}."""
        return {name: value for name, value in (self.conditions.get("identity") or {}).items() if name not in SAMPLE}

    def identity(self) -> dict[str, Any]:
        """What makes the system: the run's options except the seed, and the settings of the evaluation."""
        settings = self.settings()
        if self.run is None:
            return {"model": str(self.conditions.get("ckpt") or self.conditions.get("predictions") or self.folder), **settings}
        fields = [field.name for field in dataclasses.fields(FAMILIES[self.options["kind"]][1]) if not field.metadata["free"]]
        return {"kind": self.options["kind"], **{name: self.options.get(name) for name in fields}, "seed": None, **settings}

    def default_label(self) -> str:
        return FAMILIES[self.options["kind"]][0] if self.run else Path(self.identity()["model"]).name

    def read_run(self, name: str, schema: dict | None = None) -> Any:
        """A JSON file of the run's folder; {} if it is not there, as in a run of an older version."""
        path = self.run / name if self.run else None
        return (read_object(path, "what a run wrote", schema) if schema else read_json(path, "what a run wrote")) \
            if path and path.is_file() else {}

    def num_trained_on(self) -> int | None:
        """Questions."""
        return len(self.read_run("train_questions.json")) or self.options.get(SIZE)

    def num_trained_parameters(self) -> int | None:
        """Of the product: all of a BERT, the adapter of a LoRA."""
        sizes = []
        for path in (self.run / "model").glob("*.safetensors") if self.run else ():
            try:
                with safe_open(path, "np") as file:
                    sizes += [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
            except SafetensorError as error:
                raise UserError(f"{path}: damaged ({error}); copy it again") from None
        return sum(sizes) or None

    def train_seconds(self) -> float | None:
        return self.read_run("finished.json", {"seconds": optional(number(0))}).get("seconds")

    def log(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl on steps. Of a step that was made again after a kill, the last one; none that a kill cut."""
        path = self.run / "log.jsonl" if self.run else None
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path and path.is_file() else []
        events = [json.loads(line) for line in lines if line.startswith('{"event": "step"') and line.endswith("}")]
        for event in events:
            check_fields(event, path, {"step": whole(0), "loss": number(-1e38)})
        return sorted({event["step"]: event for event in events}.values(), key=lambda event: event["step"])


@dataclass
class System:
    evaluations: list[Evaluation]  # one for each seed
    label: str
    size: int | None  # training questions; None: unknown
    curve: int = 0  # the number of its curve
    place: int = 0  # of its size among those of all curves; 0 is the largest one

    @property
    def identity(self) -> dict[str, Any]:
        return self.evaluations[0].identity()

    def scores(self, name: str) -> np.ndarray:
        """[S, N]"""
        return np.stack([evaluation.scores[name] for evaluation in self.evaluations])


def read_systems(paths: tuple[str, ...]) -> tuple[list[System], list[str]]:
    """The systems, curve by curve and there by size, all on the same questions in the same order; and warnings.

    paths: folders, or NAME=FOLDER: the folders with one name are one system, of several seeds.
    """
    evaluations: dict[Path, tuple[str, Evaluation]] = {}
    warnings, first = [], None
    for text in paths:
        name, _, path = ("", "", text) if Path(text).exists() else text.rpartition("=")
        path = Path(path)
        folder = path / "evaluation" if (path / "evaluation" / "per_question.json").is_file() else path
        if (folder / "per_question.json").is_file():
            known, evaluation = evaluations.setdefault(folder.resolve(), (name, read_evaluation(folder, first)))
            if known != name:
                raise UserError(f"{folder} has two names, {known!r} and {name!r}; give it once")
            first = first or evaluation
        elif (path / "options.json").is_file():
            missing = (f"without evaluation/; python evaluate.py --ckpt {path} --data FILE --out {path}/evaluation makes it"
                       if (path / "finished.json").is_file() else "that is not finished")
            warnings.append(f"{path} is left out: a run {missing}")
        elif path.is_dir():
            warnings.append(f"{path} is left out: no evaluation there (per_question.json); of a folder of runs give {path}/*")
        else:
            raise UserError(f"{path}: no such folder; expected one that evaluate.py wrote on data with answers, or a run with "
                            "such a folder evaluation/")
    if first is None:
        raise UserError("; ".join(["nothing to report: no folder with an evaluation, as evaluate.py writes it on data with "
                                   "answers", *warnings]))
    systems = make_systems(list(evaluations.values()))
    tell_apart(systems)
    find_curves(systems)
    return sorted(systems, key=lambda system: (system.curve, -system.place)), warnings


def make_systems(evaluations: list[tuple[str, Evaluation]]) -> list[System]:
    """Evaluations with one name are a system, and so are those without a name that have one identity."""
    systems: dict[str, System] = {}
    for name, new in evaluations:
        system = systems.setdefault(name or json.dumps(new.identity(), sort_keys=True),
                                    System([], name or new.default_label(), new.num_trained_on()))
        for old in system.evaluations:
            if new.run and new.identity() == old.identity() and new.options.get("seed") == old.options.get("seed"):
                raise UserError(f"{old.folder} and {new.folder} are of the same training, not of two seeds; give one, or "
                                "a name to each (A=FOLDER B=FOLDER)")
        system.evaluations.append(new)
    return list(systems.values())


def read_evaluation(folder: Path, first: Evaluation | None) -> Evaluation:
    """`first`: the evaluation whose questions this one must have."""
    questions = read_object(folder / "per_question.json", "the scores of each question, as evaluate.py writes them", {})
    for question_id, entry in questions.items():
        check_fields(entry, f"{folder / 'per_question.json'}: {question_id}", QUESTION)
    ids = first.titles if first else questions
    if questions.keys() != ids.keys() or not questions:
        raise UserError(f"{folder}: its {counted(len(questions), 'question')} are not the {len(ids):,} of "
                        f"{first.folder if first else 'any data'}; a report is about the same questions for all: leave one out")
    scores = {name: np.array([questions[question_id][name] for question_id in ids], dtype=float)  # None becomes nan
              for name in ("exact", "f1", "confidence", "no_answer_score")}
    has_conditions = (folder / "conditions.json").is_file()
    conditions = read_object(folder / "conditions.json", "how the answers were made", CONDITIONS) if has_conditions else {}
    model = Path(str(conditions.get("ckpt", "")))
    run = next((path for path in (folder.parent, model, model.parent) if (path / "options.json").is_file()), None)
    options = read_object(run / "options.json", "the options of a run", RUN) if run else {}
    return Evaluation(folder, {question_id: questions[question_id]["title"] for question_id in ids},
                      [questions[question_id]["prediction"] for question_id in ids], scores, conditions, run, options)


def tell_apart(systems: list[System]) -> None:
    """Add options to equal labels, one after another, until they differ: "BERT, lr 0.0001", "BERT, lr 0.0002"."""
    names = [name for system in systems for name in system.identity if name not in (SIZE, *RECIPE)]
    for name in dict.fromkeys([*names, SIZE, *RECIPE]):
        for label in {system.label for system in systems}:
            same = [system for system in systems if system.label == label]
            values = [system.size if name == SIZE else system.identity.get(name) for system in same]
            for system, value in zip(same, values, strict=True) if len(set(map(str, values))) > 1 else ():
                if value is not None:
                    system.label += f", {counted(value, 'question') if name == SIZE else f'{flag(name)[2:]} {value}'}"
    for place, system in enumerate(systems, start=1):
        if [other.label for other in systems].count(system.label) > 1:
            system.label += f" ({place})"


def find_curves(systems: list[System]) -> None:
    """Number the curves. A system whose size is unknown, or that of another one of its curve, is a curve of its own."""
    groups: dict[str, list[System]] = {}
    for system in systems:
        fixed = {name: value for name, value in system.identity.items() if name not in (SIZE, *RECIPE)}
        groups.setdefault(json.dumps(fixed, sort_keys=True), []).append(system)
    curves = []
    for group in groups.values():
        has_sizes = len({system.size for system in group} - {None}) == len(group)
        curves += [group] if has_sizes else [[system] for system in group]
    sizes = sorted({system.size for group in curves if len(group) > 1 for system in group}, reverse=True)
    for curve, group in enumerate(curves):
        for system in group:
            system.curve, system.place = curve, sizes.index(system.size) if len(group) > 1 else 0
