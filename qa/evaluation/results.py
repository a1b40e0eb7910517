"""The files that an evaluation leaves.

    metrics.json        the official keys
    per_question.json   {id: {title, exact, f1, prediction, confidence, no_answer_score}}; exact and f1 are from 0 to 1
    predictions.json    {id: answer}: what the official scripts read
    nbest.json          {id: [{text, start_char, end_char, score, confidence}, ...]}, best first
    generated.json      LLaMA, greedy: {id: {text, grounding}}, what the model wrote and how that was found in the passage
    null_odds.json      v2.0: {id: no-answer score}; Google's BERT gave the file this name
    conditions.json     the model, the data and the settings that gave the figures
    environment.json    the script, its command, the commit of this code, when it began, and how many seconds it took

A new set replaces the old one as a whole. Used by: evaluate.py, training/evaluator.py, training/run.py (`environment`).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

import numpy as np

from qa.data.squad import SquadData
from qa.errors import UserError
from qa.evaluation.calibration import final_confidences
from qa.evaluation.scoring import final_answers, no_answer_scores, scores_of_questions
from qa.files import check_out, sync, writing
from qa.prediction import Prediction

NAMES = ("metrics.json", "per_question.json", "predictions.json", "nbest.json", "generated.json", "null_odds.json",
         "conditions.json", "environment.json")


def default_folder(ckpt: str, data: str, settings: dict[str, Any]) -> Path:
    """A folder inside that of the run or the checkpoint; under runs/ if the model has no folder of the user's.

    Its name tells the data and the settings, which are the options that the user typed and that change the answers:
    runs/bert/evaluation-dev-v1.1-max-length-256. If this folder holds another evaluation, the new name ends in a number.
    """
    parts = ["evaluation", Path(data).stem, *(f"{name.replace('_', '-')}-{Path(str(value)).name}"
                                              for name, value in settings.items())]
    name = re.sub(r"[^\w.-]+", "-", "-".join(parts))[:150]
    folder = Path(ckpt)
    if not folder.is_dir():
        folder = Path("runs") / re.sub(r"[^\w.-]+", "-", folder.name)
    elif folder.name == "model" and (folder.parent / "options.json").is_file():
        folder = folder.parent  # not in model/, which the run replaces with the next save
    numbered = (folder / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
    return next(path for path in numbered if _saved_identity(path) in (None, identity(ckpt, data, settings)))


def check_results_folder(folder: Path | str) -> None:
    """Refuse a folder that cannot be written to, or that a run would delete, before anything is computed."""
    check_out(folder)
    for path in (Path(folder), *Path(folder).parents):
        if path.name == "model" and (path.parent / "options.json").is_file():
            raise UserError(f"--out {folder}: is inside {path}, which its run replaces with the next save; choose another")


def identity(ckpt: str, data: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Two evaluations are the same if these are equal: model (left out where it is a folder), data, typed options."""
    values = {"ckpt": "" if Path(ckpt).is_dir() else ckpt, "data": data, **settings}
    return {name: str(Path(value).resolve()) if isinstance(value, str) and value and Path(value).exists() else value
            for name, value in values.items()}


def _saved_identity(folder: Path) -> dict[str, Any] | None:
    """The identity of the evaluation in `folder`; None: there is none."""
    try:
        return json.loads((folder / "conditions.json").read_bytes())["identity"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


class MadeWhenRead(Mapping):
    """{id: content}, where each content is made when it is asked for: all together would fill the memory."""

    def __init__(self, made_from: dict[str, Any], make: Callable[[Any], Any]) -> None:
        self.made_from, self.make = made_from, make

    def __getitem__(self, question_id: str) -> Any:
        return self.make(self.made_from[question_id])

    def __iter__(self) -> Iterator[str]:
        return iter(self.made_from)

    def __len__(self) -> int:
        return len(self.made_from)


def result_files(data: SquadData, predictions: list[Prediction], na_threshold: float | None) -> dict[str, Mapping]:
    """The files that hold the predictions: name -> content. There is no per_question.json if the data has no answers."""
    answers = final_answers(predictions, na_threshold)
    confidences = dict(zip(answers, final_confidences(predictions, na_threshold).tolist(), strict=True))
    scores = scores_of_questions(data, predictions, na_threshold) if data.has_answers else ()
    na_scores = no_answer_scores(predictions)
    return {
        "per_question.json": per_question(data, answers, *scores, confidences, na_scores) if scores else {},
        "predictions.json": answers,
        "nbest.json": MadeWhenRead({prediction.id: prediction for prediction in predictions}, _nbest),
        "null_odds.json": na_scores,
        "generated.json": MadeWhenRead({prediction.id: prediction for prediction in predictions
                                        if prediction.raw_text is not None}, _generated),
    }


def per_question(data: SquadData, answers: dict[str, str], exact: np.ndarray, f1: np.ndarray,
                 confidences: dict[str, float] | None = None,
                 na_scores: dict[str, float] | None = None) -> Mapping[str, dict[str, Any]]:
    """{id: what is known of this question}, in the order of the data. What is not in a dict is None. exact, f1: [N]."""
    examples, titles = data.examples, data.titles

    def make(row: int) -> dict[str, Any]:
        id = examples[row].id
        return {"title": titles[row], "exact": float(exact[row]), "f1": float(f1[row]), "prediction": answers.get(id),
                "confidence": (confidences or {}).get(id), "no_answer_score": (na_scores or {}).get(id)}

    return MadeWhenRead({example.id: row for row, example in enumerate(examples)}, make)


def environment(began: float) -> dict[str, Any]:
    """How files came to be. began: `Runtime.began`. The commit ends in "-dirty" if files were changed; None: no git."""
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40",
           "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {"script": Path(sys.argv[0]).name, "command": shlex.join(sys.argv), "commit": commit,
            "began": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(began)), "seconds": round(time.time() - began, 1)}


def write_results(folder: Path | str, files: dict[str, Mapping]) -> None:
    """Write `files`, {one of NAMES: content}, into `folder`; no empty content. An earlier set is deleted, other files stay."""
    folder = Path(folder)
    check_results_folder(folder)
    names = [name for name in NAMES if files.get(name)]
    staged = folder / ".new-results"
    shutil.rmtree(staged, ignore_errors=True)
    with writing(folder):
        staged.mkdir(parents=True)
        for name in names:
            with open(staged / name, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                file.writelines(_json_parts(files[name]))
            sync(staged / name)
    for name in NAMES:  # killed after this, a part of the new set remains: never a mixture
        (folder / name).unlink(missing_ok=True)
    for name in names:
        os.replace(staged / name, folder / name)
    staged.rmdir()


def _json_parts(content: Mapping) -> Iterator[str]:
    """files.json_bytes(content) as text, item by item. A JSON string has no newline in it, so every newline is the layout's."""
    before = "{\n "
    for key, value in content.items():
        if isinstance(content, MadeWhenRead) and isinstance(value, list) and value:  # nbest.json
            text = "[\n  " + ",\n  ".join(map(_entry_text, value)) + "\n ]"
        else:
            text = encode_basestring(value) if isinstance(value, str) else _layout(value).replace("\n", "\n ")
        yield f"{before}{encode_basestring(key)}: {text}"
        before = ",\n "
    yield "\n}\n"


def _entry_text(entry: dict[str, Any]) -> str:
    """An entry of nbest.json, as `_layout` gives it, which takes several times as long; they are most of what is written."""
    text, start, end, score, confidence = entry.values()
    if score is None or not math.isfinite(score + confidence):
        return _layout(entry).replace("\n", "\n  ")
    start, end = ("null", "null") if start is None else (start, end)
    return (f'{{\n   "text": {encode_basestring(text)},\n   "start_char": {start},\n   "end_char": {end},\n   '
            f'"score": {score!r},\n   "confidence": {confidence!r}\n  }}')


_layout = json.JSONEncoder(ensure_ascii=False, allow_nan=False, indent=1).encode


def _generated(prediction: Prediction) -> dict[str, Any]:
    return {"text": prediction.raw_text, "grounding": prediction.grounding}


def _nbest(prediction: Prediction) -> list[dict[str, Any]]:
    entries = [{"text": found.text, "start_char": found.start_char, "end_char": found.end_char, "score": found.score,
                "confidence": found.confidence} for found in prediction.candidates]
    if prediction.no_answer_score is not None:
        entries.append({"text": "", "start_char": None, "end_char": None, "score": prediction.null_score,
                        "confidence": prediction.null_confidence})
        entries.sort(key=lambda entry: math.inf if entry["score"] is None else -entry["score"])
    return entries
