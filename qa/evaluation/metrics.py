"""Exact match (EM) and F1 by the official rules of SQuAD v1.1 and v2.0, and thresholds for "no answer".

Written from the rules of evaluate-v1.1.py (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1) and of
evaluate-v2.0.py (Rajpurkar et al. 2018, arXiv:1806.03822). Texts are normalised first; the best gold counts:

    EM = 1 if both texts are equal, else 0
    F1 = 2 P R / (P + R),   P = common / tokens of the prediction,   R = common / tokens of the gold,
    common = the size of the intersection of the two multisets of tokens

                                              v1.1          v2.0
    both texts empty once normalised          EM 1, F1 0    EM 1, F1 1
    golds that are empty once normalised      compared      dropped; if none remains, the gold is ""
    na_prob > threshold                                     1 if the file has no gold for the question, else 0
    no gold in the file                       0 *           unanswerable: the gold is ""
    no prediction for the question            0             0 *, even if it is unanswerable

Where the official scripts crash (*), or their figure cannot be had, we deviate. A question without na_prob
keeps its prediction at every threshold *. The official search for best_exact and best_f1 goes through the
questions by na_prob and may stop between two of the same na_prob, where no threshold can (transformers#8710):
ours takes them together. The official one also believes that a threshold of 0 refuses all, whatever the
scores, and that "the" is a wrong answer where "" is right: ours does not.

Input: examples from data/squad.py; predictions, {id: text}.
Used by: scoring.py, evaluate.py (a file of predictions), grounding.py (`normalize_answer`).
Legend: N questions, in the examples' order; G distinct na_probs.
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter

import numpy as np

from qa.data.squad import Example

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)  # the 32 of ASCII; "–" and "“" stay
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case, drop punctuation, drop articles, squeeze blanks: "The U.S.-born  man" → "usborn man"."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> int:
    return int(normalize_answer(prediction) == normalize_answer(gold))


def f1_score(prediction: str, gold: str, is_v2: bool) -> float:
    """F1 of two texts as they come, in 0..1."""
    return _token_f1(normalize_answer(prediction), normalize_answer(gold), is_v2)


def question_scores(examples: list[Example], predictions: dict[str, str],
                    is_v2: bool) -> tuple[np.ndarray, np.ndarray]:
    """EM and F1 of every question, before any threshold: two float64 arrays [N] of values in 0..1."""
    normalize = functools.cache(normalize_answer)  # golds repeat one another: each text is normalised once
    exact, f1 = np.zeros(len(examples)), np.zeros(len(examples))  # [N]
    for row, example in enumerate(examples):
        if example.id in predictions:
            golds = [normalize(text) for text in example.gold_texts]
            exact[row], f1[row] = _best_over_golds(normalize(predictions[example.id]), golds, is_v2)
    return exact, f1


def missing_predictions(examples: list[Example], predictions: dict[str, str]) -> list[str]:
    """Ids of the questions without a prediction: they count as wrong, and the caller warns."""
    return [example.id for example in examples if example.id not in predictions]


def score_v1(examples: list[Example], predictions: dict[str, str]) -> dict[str, float]:
    """The official v1.1 figures, in percent over every question."""
    exact, f1 = question_scores(examples, predictions, is_v2=False)
    return {"exact_match": _percent(exact), "f1": _percent(f1), "total": len(examples)}


def score_v2(examples: list[Example], predictions: dict[str, str], na_probs: dict[str, float] | None = None,
             na_threshold: float = 1.0) -> dict[str, float]:
    """The official v2.0 figures, in percent, under the official keys and in their order.

    Args:
        na_probs: {id: score}, on any scale; higher means "no answer". With it there are best_* figures.
        na_threshold: a question is refused if its na_prob is greater than this (not if it is equal).
    """
    raw_scores = question_scores(examples, predictions, is_v2=True)
    has_answer = _has_answer(examples)  # [N]
    refused = _na_scores(examples, predictions, na_probs or {}) > na_threshold  # [N]
    exact, f1 = (np.where(refused, ~has_answer, scores) for scores in raw_scores)  # [N]
    metrics: dict[str, float] = {}
    for prefix, part in (("", has_answer | True), ("HasAns_", has_answer), ("NoAns_", ~has_answer)):
        if part.any():
            metrics |= {f"{prefix}exact": _percent(exact[part]), f"{prefix}f1": _percent(f1[part]),
                        f"{prefix}total": int(part.sum())}
    if na_probs is not None:
        thresholds, *curves = _threshold_curves(examples, predictions, na_probs, raw_scores)
        for name, curve in zip(("exact", "f1"), curves, strict=True):
            best = int(curve.argmax())  # of equal ones the lowest, as in the official search
            metrics |= {f"best_{name}": 100.0 * float(curve[best]) / len(examples),
                        f"best_{name}_thresh": float(thresholds[best])}
    return metrics


def best_threshold(examples: list[Example], predictions: dict[str, str],
                   na_scores: dict[str, float]) -> tuple[float, dict[str, float]]:
    """The threshold of the highest F1, to be used on other questions, and `score_v2` with it.

    Ties: the higher EM, then the lowest threshold. It is put midway between the scores on its two sides, as
    that changes nothing here and treats new scores in the gap evenly; to refuse none it is the highest score.
    """
    raw_scores = question_scores(examples, predictions, is_v2=True)
    levels, exact, f1 = _threshold_curves(examples, predictions, na_scores, raw_scores)  # [G + 1] each
    best = max(range(len(levels)), key=lambda g: (round(f1[g], 9), round(exact[g], 9), -g))
    threshold = float(levels[best])
    if 0 < best < len(levels) - 1:
        midway = 0.5 * threshold + 0.5 * float(levels[best + 1])
        if threshold < midway < levels[best + 1]:  # neighbouring floats have nothing between them
            threshold = midway
    return threshold, score_v2(examples, predictions, na_scores, threshold)


def _threshold_curves(examples: list[Example], predictions: dict[str, str], na_probs: dict[str, float],
                      raw_scores: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All thresholds that differ in effect, ascending, and the sums of EM and of F1 at each: [G + 1] each.

    The first refuses every question that has a na_prob; number g accepts those with the g lowest na_probs.
    """
    na, unanswerable = _na_scores(examples, predictions, na_probs), ~_has_answer(examples)  # [N], [N]
    refusable = np.isfinite(na)  # [N]
    levels, num_below = np.unique(np.sort(na[refusable]), return_index=True)  # [G], [G]
    num_accepted = np.append(num_below, refusable.sum())  # [G + 1]
    below_all = np.nextafter(levels[0], -np.inf) if len(levels) and levels[0] <= 0 else 0.0  # officially 0
    sums = []
    for scores in raw_scores:
        all_refused = scores[~refusable].sum() + unanswerable[refusable].sum()
        gains = (scores - unanswerable)[refusable][np.argsort(na[refusable], kind="stable")]  # of accepting
        sums.append(np.cumsum(np.append(all_refused, gains))[num_accepted])  # added one by one, as officially
    return np.append(below_all, levels), sums[0], sums[1]


def _na_scores(examples: list[Example], predictions: dict[str, str],
               na_probs: dict[str, float]) -> np.ndarray:
    """[N]; -inf, never refused, without na_prob, and without a prediction (which is wrong, not a refusal)."""
    scores = np.array([na_probs.get(example.id, -np.inf) if example.id in predictions else -np.inf
                       for example in examples], dtype=np.float64)
    assert (scores < np.inf).all(), "a no-answer score is not a finite number"
    return scores


def _has_answer(examples: list[Example]) -> np.ndarray:
    """[N] bool, by the golds and not by the flag is_impossible, as officially."""
    return np.array([bool(example.gold_texts) for example in examples], dtype=bool)


def _percent(scores: np.ndarray) -> float:
    assert len(scores) > 0, "no question to score"
    return 100.0 * float(scores.sum()) / len(scores)


def _best_over_golds(prediction: str, golds: list[str], is_v2: bool) -> tuple[int, float]:
    """(EM, F1) of texts that are normalised."""
    if is_v2:
        golds = [gold for gold in golds if gold] or [""]
    if prediction and prediction in golds:
        return 1, 1.0
    f1 = max((_token_f1(prediction, gold, is_v2) for gold in set(golds)), default=0.0)
    return int(prediction in golds), f1


def _token_f1(prediction: str, gold: str, is_v2: bool) -> float:
    """F1 of texts that are normalised."""
    prediction_tokens, gold_tokens = prediction.split(), gold.split()
    if not prediction_tokens or not gold_tokens:
        return float(is_v2 and prediction_tokens == gold_tokens)
    num_common = sum((Counter(prediction_tokens) & Counter(gold_tokens)).values())
    if num_common == 0:
        return 0.0
    precision, recall = num_common / len(prediction_tokens), num_common / len(gold_tokens)
    return 2 * precision * recall / (precision + recall)
