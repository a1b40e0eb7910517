"""A confidence that means what it says: of the answers with a confidence of 0.8, about 8 in 10 should be right.

A model's own confidences are too high for that as a rule (Guo et al. 2017, arXiv:1706.04599). Two numbers that a run chooses on
held-out articles put them right. The first is the no-answer threshold t: "no answer" wins where its score is above t. So the
odds of "no answer" are divided by exp(t), and what it loses goes to the spans in proportion; n is its confidence, c a span's:

    n' = n exp(-t) / (1 - n + n exp(-t))        c' = c / (1 - n + n exp(-t))

The second is the temperature T (section 4.2 there; for a yes-or-no question it is Platt's scaling without its constant):

    log odds(c'') = log odds(c') / T            log odds(p) = log(p / (1 - p))

T is the number with which "right" and "wrong" (EM) on the held-out questions are the most probable. For example, with T = 2 the
confidence 0.9 (odds 9) becomes 0.75 (odds 3). Every answer keeps its place in the list. The confidences of all spans no longer
add up to 1: each by itself is the probability that this answer is right.

Used by: scoring.py and training/evaluator.py (to fit, to measure), evaluate.py and qa/asking.py (to apply),
reporting/plots.py (to show).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from qa.evaluation.metrics import is_refused
from qa.prediction import Prediction

NUM_BINS = 10  # of the calibration error
MOST = 1 - 1e-9  # a confidence beyond it (or below 1 - MOST) counts as this: its log odds are finite
SHARPEST, FLATTEST = 0.1, 10.0  # the temperatures that a fit may give


def calibrate(predictions: list[Prediction], na_threshold: float | None, temperature: float | None) -> list[Prediction]:
    """The same predictions with the confidences c'' and n''. Without a temperature they are left as they are."""
    if temperature is None:
        return predictions
    return [_calibrate(prediction, na_threshold or 0.0, temperature) for prediction in predictions]


def _calibrate(prediction: Prediction, na_threshold: float, temperature: float) -> Prediction:
    refusal, log_total = prediction.null_confidence, 0.0
    if refusal is not None:
        refusal = min(max(refusal, 1 - MOST), MOST)
        log_total = float(np.logaddexp(math.log1p(-refusal), math.log(refusal) - na_threshold))

    def scaled(confidence: float, shift: float) -> float:
        return float(_sigmoid(_log_odds(min(confidence * math.exp(shift - log_total), MOST)) / temperature))

    candidates = [replace(found, confidence=scaled(found.confidence, 0.0)) for found in prediction.candidates]
    return replace(prediction, candidates=candidates,
                   null_confidence=None if refusal is None else scaled(refusal, -na_threshold))


def final_confidences(predictions: list[Prediction], na_threshold: float | None) -> np.ndarray:
    """[N] the confidence of each final answer: of "no answer" where that is given, else of the best span (0: there is none)."""
    return np.array([_final_confidence(prediction, na_threshold) for prediction in predictions])


def _final_confidence(prediction: Prediction, na_threshold: float | None) -> float:
    score = prediction.no_answer_score
    refused = na_threshold is not None and score is not None and is_refused(score, na_threshold)
    if refused or not prediction.candidates:
        return prediction.null_confidence or 0.0
    return prediction.candidates[0].confidence


def fit_temperature(confidences: np.ndarray, is_right: np.ndarray) -> float:
    """T with the largest likelihood: sum of log c'' over the right answers and log(1 - c'') over the wrong ones.

    confidences: [N] at T = 1. is_right: [N] bool. With w = 1 / T and the log odds x, minus the derivative is the sum of
    (sigmoid(w x) - is_right) x, which only grows with w. So bisection finds its zero.
    """
    x = _log_odds(confidences)  # [N]
    low, high = 1 / FLATTEST, 1 / SHARPEST
    for _ in range(60):
        middle = (low + high) / 2
        if ((_sigmoid(middle * x) - is_right) * x).sum() > 0:
            high = middle
        else:
            low = middle
    return 1 / high


def calibration_error(confidences: np.ndarray, is_right: np.ndarray) -> float:
    """The expected calibration error (ECE; Naeini et al. 2015): |share of right answers - mean confidence| in each of ten bins
    of equal width, weighted by the answers in it. 0 is perfect; 0.05 means 5 points too high or too low on average."""
    bins = np.minimum((confidences * NUM_BINS).astype(int), NUM_BINS - 1)  # [N]
    gaps = np.bincount(bins, weights=confidences - is_right, minlength=NUM_BINS)  # of a bin: its size times its gap
    return float(np.abs(gaps).sum() / len(confidences))


def coverage_area(confidences: np.ndarray, is_right: np.ndarray) -> float:
    """The area under the coverage-accuracy curve, in percent (El-Yaniv & Wiener 2010).

    Answer only the k most confident questions; take the share of right answers among them; and the mean over k = 1 ... N. In a
    random order this is about the EM. 100 is the most.
    """
    ordered = is_right[np.argsort(-confidences, kind="stable")].astype(np.float64)
    return 100.0 * float((np.cumsum(ordered) / np.arange(1, len(ordered) + 1)).mean())


def _log_odds(probabilities: np.ndarray | float) -> np.ndarray:
    probabilities = np.clip(probabilities, 1 - MOST, MOST)
    return np.log(probabilities) - np.log1p(-probabilities)


def _sigmoid(x: np.ndarray | float) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -700, 700)))
