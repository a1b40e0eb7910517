"""Confidences that mean what they say.

One worked case: a confidence of 0.9 has the odds 9 : 1. With the temperature 2 its log odds are halved, its odds are 3 : 1, and
its confidence is 0.75.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from qa.evaluation.calibration import calibrate, calibration_error, coverage_area, final_confidences, fit_temperature
from qa.prediction import Candidate, Prediction


def prediction(scores: list[float], null: float | None = None) -> Prediction:
    """As a decoder makes it of some spans' scores and, for v2.0, a null score."""
    total = np.logaddexp.reduce(scores if null is None else [*scores, null])
    candidates = [Candidate(f"s{i}", i, i + 1, score, float(np.exp(score - total))) for i, score in enumerate(scores)]
    if null is None:
        return Prediction("q", "s0", candidates)
    return Prediction("q", "s0", candidates, null - scores[0], null, float(np.exp(null - total)))


def test_worked_case():
    (found,) = calibrate([Prediction("q", "s", [Candidate("s", 0, 1, 1.0, 0.9)])], None, 2.0)
    assert found.candidates[0].confidence == pytest.approx(0.75) and found.null_confidence is None


def test_without_a_temperature_nothing_changes():
    predictions = [prediction([2.0, 1.0], 0.5)]
    assert calibrate(predictions, 3.0, None) is predictions


@pytest.mark.parametrize("threshold", [-3.0, 0.0, 2.5])
def test_the_threshold_moves_the_null_score(threshold):
    """The same as a softmax over the spans and the null score minus the threshold: then the larger confidence wins."""
    scores, null = [2.0, 1.0, -1.0], 2.2
    expected = prediction(scores, null - threshold)
    (found,) = calibrate([prediction(scores, null)], threshold, 1.0)
    assert [one.confidence for one in found.candidates] == pytest.approx([one.confidence for one in expected.candidates])
    assert found.null_confidence == pytest.approx(expected.null_confidence)
    refused = found.no_answer_score > threshold
    assert refused == (found.null_confidence > found.candidates[0].confidence)
    assert final_confidences([found], threshold)[0] == (found.null_confidence if refused else found.candidates[0].confidence)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 4.0])
def test_every_answer_keeps_its_place(temperature):
    (found,) = calibrate([prediction([3.0, 2.0, 1.0, -9.0])], None, temperature)
    confidences = [one.confidence for one in found.candidates]
    assert confidences == sorted(confidences, reverse=True) and all(0 < one < 1 for one in confidences)


def test_certain_confidences_stay_finite():
    candidates = [Candidate("a", 0, 1, 1.0, 1.0), Candidate("b", 0, 1, 0.0, 0.0)]
    for null in (None, 0.0, 1.0):
        for threshold in (-500.0, 0.0, 500.0):
            (found,) = calibrate([Prediction("q", "a", candidates, null, null, null)], threshold, 0.5)
            assert all(0 <= one.confidence <= 1 for one in found.candidates)
    assert 0.1 <= fit_temperature(np.array([0.0, 1.0]), np.array([True, False])) <= 10.001


def log_likelihood(temperature: float, confidences: np.ndarray, is_right: np.ndarray) -> float:
    scaled = [1 / (1 + ((1 - p) / p) ** (1 / temperature)) for p in confidences]
    return sum(math.log(p if right else 1 - p) for p, right in zip(scaled, is_right, strict=True))


def test_the_fit_has_the_largest_likelihood_of_a_fine_grid():
    confidences = np.array([0.95, 0.9, 0.9, 0.8, 0.7, 0.6, 0.3, 0.2, 0.99, 0.85])
    is_right = np.array([1, 1, 0, 1, 0, 1, 0, 0, 1, 0], dtype=bool)
    grid = np.geomspace(0.1, 10, 2001)
    best = grid[np.argmax([log_likelihood(temperature, confidences, is_right) for temperature in grid])]
    assert fit_temperature(confidences, is_right) == pytest.approx(best, rel=0.003)


def test_the_fit_finds_the_temperature_that_made_the_answers():
    """1,000 answers to each confidence, of which the share sigmoid(log odds / 2.5) is right."""
    confidences, is_right = [], []
    for p in (0.5, 0.8, 0.95, 0.99):
        num_right = round(1000 / (1 + ((1 - p) / p) ** (1 / 2.5)))
        confidences += [p] * 1000
        is_right += [True] * num_right + [False] * (1000 - num_right)
    confidences, is_right = np.array(confidences), np.array(is_right)
    temperature = fit_temperature(confidences, is_right)
    assert temperature == pytest.approx(2.5, rel=0.01)
    log_odds = np.log(confidences / (1 - confidences))
    assert calibration_error(1 / (1 + np.exp(-log_odds / temperature)), is_right) < 0.002
    assert calibration_error(confidences, is_right) > 0.1


def test_calibration_error_of_two_bins():
    """0.9 twice, one of them right: 0.4 too high. 0.3 twice, none right: 0.3 too high. On average 0.35."""
    assert calibration_error(np.array([0.9, 0.9, 0.3, 0.3]), np.array([1, 0, 0, 0], dtype=bool)) == pytest.approx(0.35)
    assert calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0.0


def test_coverage_area_of_three_answers():
    """Right, wrong, right by confidence: the shares of right ones are 1, 1/2, 2/3."""
    confidences, is_right = np.array([0.2, 0.9, 0.5]), np.array([True, True, False])
    assert coverage_area(confidences, is_right) == pytest.approx(100 * (1 + 1 / 2 + 2 / 3) / 3)
