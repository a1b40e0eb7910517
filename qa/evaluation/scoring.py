"""From a model's predictions to the official figures, and the choice of a no-answer threshold.

    reader.answer(data).predictions -> `score_predictions` -> metrics.py -> {"exact_match": 80.1, "f1": 88.2, ...}

Input: `Prediction`s (qa/prediction.py), made by bert/reader.py or llama/reader.py. Used by: evaluate.py, training/evaluator.py;
results.py (`final_answers`, `no_answer_scores`, `scores_of_questions`).
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from qa.data.squad import SquadData
from qa.evaluation.calibration import calibrate, calibration_error, coverage_area, final_confidences, fit_temperature
from qa.evaluation.metrics import best_threshold, final_scores, is_refused, question_scores, score_v1, score_v2
from qa.prediction import Prediction


def unrefused_answers(predictions: list[Prediction]) -> dict[str, str]:
    """{id: text}, whatever the no-answer scores are."""
    return {prediction.id: prediction.text for prediction in predictions}


def final_answers(predictions: list[Prediction], na_threshold: float | None) -> dict[str, str]:
    """{id: text}, the official form; "" where the no-answer score is above the threshold (v2.0). None (v1.1) refuses none."""
    answers = unrefused_answers(predictions)
    if na_threshold is None:
        return answers
    return answers | {question_id: "" for question_id, score in no_answer_scores(predictions).items()
                      if is_refused(score, na_threshold)}


def no_answer_scores(predictions: list[Prediction]) -> dict[str, float]:
    return {prediction.id: prediction.no_answer_score for prediction in predictions if prediction.no_answer_score is not None}


def score_predictions(data: SquadData, predictions: list[Prediction], na_threshold: float | None,
                      temperature: float | None = None) -> dict[str, float]:
    """The official figures of `predictions` on `data`, and `raw_metrics` and `confidence_metrics`.

    predictions: with the model's own confidences. In v2.0 a threshold of None counts as 0.
    """
    texts = unrefused_answers(predictions)
    if data.is_v2:
        metrics = score_v2(data.examples, texts, no_answer_scores(predictions), na_threshold or 0.0)
    else:
        metrics = score_v1(data.examples, texts)
    return metrics | raw_metrics(data, predictions) | confidence_metrics(data, predictions, na_threshold, temperature)


def scores_of_questions(data: SquadData, predictions: list[Prediction],
                        na_threshold: float | None) -> tuple[np.ndarray, np.ndarray]:
    """EM and F1 of every question, 0 to 1: [N] and [N], whose means are the figures of `score_predictions`."""
    return final_scores(data.examples, unrefused_answers(predictions), data.is_v2, no_answer_scores(predictions),
                        na_threshold or 0.0)


def choose_threshold(data: SquadData, predictions: list[Prediction]) -> float:
    """The no-answer threshold with the best F1 on `data`, to be used on other questions."""
    return best_threshold(data.examples, unrefused_answers(predictions), no_answer_scores(predictions))


def choose_temperature(data: SquadData, predictions: list[Prediction], na_threshold: float | None) -> float:
    """The temperature that fits `data`, for the confidences of answers to other questions (calibration.py)."""
    untouched = calibrate(predictions, na_threshold, 1.0)
    right = scores_of_questions(data, predictions, na_threshold)[0] > 0  # [N] bool: EM of the final answers
    return fit_temperature(final_confidences(untouched, na_threshold), right)


def confidence_metrics(data: SquadData, predictions: list[Prediction], na_threshold: float | None,
                       temperature: float | None) -> dict[str, float]:
    """How far the confidences are off, with the temperature and (where there is one) without; and the coverage area."""
    threshold = (na_threshold or 0.0) if data.is_v2 else None
    right = scores_of_questions(data, predictions, na_threshold)[0] > 0  # [N] bool: EM of the final answers
    used = final_confidences(calibrate(predictions, threshold, temperature), threshold)
    metrics = {"ece": calibration_error(used, right), "coverage_area": coverage_area(used, right)}
    if temperature is not None:
        metrics["ece_uncalibrated"] = calibration_error(final_confidences(predictions, threshold), right)
    return metrics


def raw_metrics(data: SquadData, predictions: list[Prediction]) -> dict[str, float]:
    """For generated texts (LLaMA, greedy): EM and F1 of what was written, and how many were grounded in which way."""
    generated = {prediction.id: "" if prediction.grounding == "refused" else prediction.raw_text
                 for prediction in predictions if prediction.raw_text is not None}
    if not generated:
        return {}
    exact, f1 = question_scores(data.examples, generated, data.is_v2)
    kinds = Counter(prediction.grounding for prediction in predictions)
    return {"raw_exact": 100 * float(exact.mean()), "raw_f1": 100 * float(f1.mean()),
            **{f"num_{kind}": kinds[kind] for kind in ("exact", "normalised", "repaired", "empty", "refused")}}
