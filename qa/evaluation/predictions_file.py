"""A file of predictions in the official form, {id: answer}, checked against the data to score it on.

Or in the form of per_question.json, whose entries have a "prediction". A second file, {id: number}, may hold no-answer scores:
higher means "no answer". evaluate.py writes all three, and the official scripts read the first and the last. Another form, or
what would give a meaningless score, such as predictions for other data, is a `UserError`. Missing ids are allowed: they count
as wrong, and the caller warns. Used by: evaluate.py (`--predictions`, `--na-probs`, `--against`).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from qa.data.fields import replace_half_pairs
from qa.data.squad import SquadData
from qa.errors import UserError
from qa.files import read_json


def load_predictions(path: str | Path, data: SquadData) -> dict[str, str]:
    """Read {id: answer}. In v2.0 the answer "" means "no answer"; predictions for v2.0 data are an error for v1.1 data."""
    predictions = _read_object(path, 'predictions {"id": "answer", ...}')
    if predictions and all(isinstance(entry, dict) and "prediction" in entry for entry in predictions.values()):
        predictions = {question_id: entry["prediction"] for question_id, entry in predictions.items()
                       if entry["prediction"] is not None}  # per_question.json
    for question_id, answer in predictions.items():
        if not isinstance(answer, str):
            raise UserError(f'{path}: the prediction for {_show(question_id)} is {_show(answer)}; expected a string, or ""')
    num_unknown = _count_unknown_ids(path, predictions, data)
    num_empty = sum(answer == "" for answer in predictions.values())
    if not data.is_v2 and num_empty and num_unknown:
        # "" alone proves nothing: a v1.1 system may fail to answer. But unanswerable questions are not among the ids of v1.1
        raise UserError(f'{path}: looks like v2.0 predictions: {num_empty:,} are "" (no answer) and {num_unknown:,} '
                        f"of {len(predictions):,} ids are not in {data.source}, which is v1.1; score them on their v2.0 data")
    return predictions


def find_predictions(path: str | Path) -> Path:
    """The file that `--against` means: the file itself, or predictions.json of an evaluation, or of the one at a run's end."""
    path = Path(path)
    if not path.is_dir():
        return path
    for folder in (path, path / "evaluation"):
        if (folder / "predictions.json").is_file():
            return folder / "predictions.json"
    raise UserError(f"{path}: a folder without predictions.json; expected an evaluation's folder, a run that scored its "
                    "--dev-data, or a file of predictions; evaluate the model first, and name that folder")


def load_na_probs(path: str | Path, data: SquadData) -> dict[str, float]:
    """Read {id: no-answer score}: finite numbers, on any scale."""
    scores = _read_object(path, 'no-answer scores {"id": number, ...}')
    for question_id, score in scores.items():
        if not isinstance(score, float) or not math.isfinite(score):
            raise UserError(f"{path}: the no-answer score of {_show(question_id)} is {_show(score)}; expected a finite number")
    _count_unknown_ids(path, scores, data)
    return scores


def _read_object(path: str | Path, form: str) -> dict:
    """The JSON object in the file; every number in it is a float."""
    document = read_json(path, f"JSON of {form}", parse_int=float)
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds {_show(document)}; expected one object of {form}")
    return {replace_half_pairs(question_id): value for question_id, value in document.items()}  # as in the data


def _count_unknown_ids(path: str | Path, values: dict, data: SquadData) -> int:
    """How many ids of the file are not in the data. An error if none is, or if an id means several questions."""
    ids = {example.id for example in data.examples}
    if shared := [question_id for question_id in values if question_id in data.repeated_ids]:
        raise UserError(f"{path}: {len(shared):,} of its ids (first: {_show(shared[0])}) mean several questions of "
                        f'{data.source}; expected the unique ids, "title/id", that evaluate.py writes')
    num_unknown = len(values.keys() - ids)
    if num_unknown == len(values):
        raise UserError(f"{path}: made for other data: 0 of its {len(values):,} ids (first: {_show(next(iter(values), None))}) "
                        f"are among the {len(ids):,} of {data.source} (first: {_show(data.examples[0].id)}); give the data it "
                        "was made for")
    return num_unknown


def _show(value: object) -> str:
    """The beginning of a value, as JSON: one short line in a message."""
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 40 else shown[:37] + "..."
