"""The files that evaluate.py leaves, and those that stand beside a product's weights.

    metrics.json        the official keys
    predictions.json    {id: answer}: what the official scripts read
    nbest.json          {id: [{text, start_char, end_char, score, confidence}, ...]}, best first
    generated.json      LLaMA's greedy decoding: {id: {text, grounding}}, what it wrote and how that was found in the passage
    null_odds.json      v2.0: {id: no-answer score}, under the name that Google's BERT gave it
    conditions.json     the model, the data and the settings behind the figures

    qa.json             in a product: what prediction needs (lengths, no-answer threshold)
    README.md           in a product: the model card
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qa.data.squad import SquadData
from qa.errors import UserError
from qa.options import TrainOptions
from qa.training.checkpoint import check_out, write_json

if TYPE_CHECKING:
    from qa.predict import Prediction


def default_folder(ckpt: str, data: str, variant: str = "") -> Path:
    """Inside the checkpoint's folder; for a model that has none of the user's own, under runs/.

    Args:
        variant: what else makes this another evaluation, such as "plain" or "sample-100", so that it does not replace the
            one of the checkpoint's own settings.
    """
    name = "-".join(["evaluation", re.sub(r"[^\w.-]+", "-", Path(data).stem), *([variant] if variant else [])])
    if Path(ckpt).is_dir():
        return Path(ckpt) / name
    return Path("runs") / re.sub(r"[^\w.-]+", "-", Path(ckpt).name) / name


def read_settings(folder: Path) -> dict[str, Any]:
    """The contents of qa.json; {} for a folder that is not ours."""
    path = folder / "qa.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it to evaluate with the options given") from None


def model_card(title: str, options: TrainOptions, data: SquadData, precision: str, details: str, step: int,
               metrics: dict[str, Any]) -> str:
    """A short README.md: base, data and size, recipe, scores."""
    questions = f"{options.max_train_questions:,} of " if options.max_train_questions else ""
    lines = [f"# {title}", "",
             f"- base: {options.model}",
             f"- training data: {options.train_data}, {questions}{len(data.examples):,} questions",
             f"- recipe: {options.epochs} epochs, batch {options.batch_size}, AdamW, lr {options.lr:g}, warm-up "
             f"{options.warmup:g}, weight decay {options.weight_decay:g}, seed {options.seed}, {precision}; {details}",
             f"- weights: those of step {step}",
             f"- scores: official rules, on {options.dev_data or 'no development data'}", ""]
    if metrics:
        lines += ["| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.2f} |" if isinstance(value, float) else f"| {name} | {value} |"
                  for name, value in metrics.items()]
    return "\n".join(lines) + "\n"


def write_results(folder: Path | str, data: SquadData, metrics: dict[str, Any], conditions: dict[str, Any],
                  predictions: list[Prediction] | None = None, na_threshold: float | None = None) -> None:
    """Write the files into `folder`, which is made if need be; without predictions, the first and the last only."""
    from qa.predict import answers

    folder = Path(folder)
    check_out(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "conditions.json", conditions)
    if predictions is None:
        write_json(folder / "metrics.json", metrics)
        return
    files = {
        "metrics.json": metrics,
        "predictions.json": answers(predictions, na_threshold),
        "nbest.json": {prediction.id: _nbest(prediction) for prediction in predictions},
        "null_odds.json": {prediction.id: prediction.no_answer_score for prediction in predictions
                           if data.is_v2 and prediction.no_answer_score is not None},
        "generated.json": {prediction.id: {"text": prediction.raw_text, "grounding": prediction.grounding}
                           for prediction in predictions if prediction.raw_text is not None},
    }
    for name, content in files.items():
        if content:
            write_json(folder / name, content)
        else:  # an earlier evaluation's must not stand beside the others
            (folder / name).unlink(missing_ok=True)


def _nbest(prediction: Prediction) -> list[dict[str, Any]]:
    entries = [dataclasses.asdict(candidate) for candidate in prediction.candidates]
    if prediction.no_answer_score is not None:
        score = _no_answer_score(prediction)
        entries.append({"text": "", "start_char": None, "end_char": None, "score": score,
                        "confidence": prediction.no_answer_confidence})
        entries.sort(key=lambda entry: math.inf if entry["score"] is None else -entry["score"])
    return entries


def _no_answer_score(prediction: Prediction) -> float | None:
    """The score of giving no answer, on the scale of the spans' scores."""
    if prediction.refusal_log_prob is not None:  # LLaMA: spans are scored by their log-probabilities
        return prediction.refusal_log_prob
    return prediction.candidates[0].score + prediction.no_answer_score if prediction.candidates else None
