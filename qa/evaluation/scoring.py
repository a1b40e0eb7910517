"""Predictions and gold answers in, the official figures out; and the no-answer threshold, chosen on held-out articles.

Input: prediction.py's `Prediction`s. Used by: evaluate.py, training/evaluator.py.
"""

from __future__ import annotations

from collections import Counter

from qa.data.squad import SquadData
from qa.evaluation.metrics import best_threshold, question_scores, score_v1, score_v2
from qa.prediction import Prediction


def final_answers(predictions: list[Prediction], na_threshold: float | None) -> dict[str, str]:
    """{id: text}, the official form; "" where the no-answer score is above the threshold (v2.0)."""
    return {prediction.id: "" if is_refused(prediction, na_threshold) else prediction.text for prediction in predictions}


def is_refused(prediction: Prediction, na_threshold: float | None) -> bool:
    score = prediction.no_answer_score
    return na_threshold is not None and score is not None and score > na_threshold


def score_predictions(data: SquadData, predictions: list[Prediction], na_threshold: float | None) -> dict[str, float]:
    """The official figures of `predictions` on `data`."""
    texts = final_answers(predictions, None)
    if not data.is_v2:
        return score_v1(data.examples, texts) | raw_metrics(data, predictions)
    metrics = score_v2(data.examples, texts, _na_scores(predictions), 0.0 if na_threshold is None else na_threshold)
    return metrics | raw_metrics(data, predictions)


def choose_threshold(data: SquadData, predictions: list[Prediction]) -> float:
    """The no-answer threshold of the best F1 on `data`, for other questions."""
    return best_threshold(data.examples, final_answers(predictions, None), _na_scores(predictions))[0]


def raw_metrics(data: SquadData, predictions: list[Prediction]) -> dict[str, float]:
    """Where texts were generated: EM and F1 of them as they came, and how many were grounded in which way."""
    generated = {prediction.id: "" if prediction.grounding == "refused" else prediction.raw_text
                 for prediction in predictions if prediction.raw_text is not None}
    if not generated:
        return {}
    exact, f1 = question_scores(data.examples, generated, data.is_v2)
    kinds = Counter(prediction.grounding for prediction in predictions)
    return {"raw_exact": 100 * float(exact.mean()), "raw_f1": 100 * float(f1.mean()),
            **{f"num_{kind}": kinds[kind] for kind in ("exact", "normalised", "repaired", "empty", "refused")}}


def _na_scores(predictions: list[Prediction]) -> dict[str, float]:
    return {prediction.id: prediction.no_answer_score for prediction in predictions if prediction.no_answer_score is not None}
