"""The official scores of SQuAD v1.1 and v2.0: exact match (EM), F1, and what a no-answer threshold does to them.

Both scores compare two texts after normalising them: lower case, no ASCII punctuation, no articles, one space between words.

    the gold          "The Denver Broncos"            ->  denver broncos
    the prediction    "Denver Broncos, of Colorado"   ->  denver broncos of colorado

    EM = 1 if the two texts are equal, else 0                                    here 0
    P  = common tokens / tokens of the prediction                                here 2 / 4
    R  = common tokens / tokens of the gold                                      here 2 / 2
    F1 = 2 P R / (P + R)                                                         here 2 * 0.5 * 1 / 1.5 = 0.67

A token that both texts have twice counts twice. Where a question has several golds, the best one counts. The EM and the F1
of a data set are the means over all its questions, in percent. In v2.0 a question without a gold is unanswerable: the right
prediction is "". The two versions differ in details:

                                              v1.1          v2.0
    both texts empty once normalised          EM 1, F1 0    EM 1, F1 1
    golds that are empty once normalised      compared      dropped; if none remains, the gold is ""
    no gold in the file                       0 *           the gold is ""
    no prediction for the question            0             0 *, even if it is unanswerable

A v2.0 model may also give each question a no-answer score, officially `na_prob`. A question whose na_prob is greater than
the threshold is refused, whatever was predicted: it scores 1 if it has no gold, else 0. A question without a na_prob is
never refused *. `best_exact` and `best_f1` are the scores at the best threshold for this data.

* The official scripts crash here; we do not.

Our search for the best threshold (`best_exact`, `best_f1`) differs from the official one in three ways:
- The official one accepts questions one at a time, even those with equal na_probs, which no threshold can tell apart
  (transformers#8710). Ours accepts them together.
- The official one assumes that a threshold of 0 refuses every question. Ours goes below the lowest na_prob.
- The official one counts the prediction "the" as wrong where "" is right. Ours normalises it to "" first.

Sources: the rules of evaluate-v1.1.py (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1) and of evaluate-v2.0.py
(Rajpurkar et al. 2018, arXiv:1806.03822). Input: examples from data/squad.py; predictions, {id: text}.
Used by: scoring.py (a model's predictions), evaluate.py (a file of predictions), llama/grounding.py (`normalize_answer`),
reporting/ (`threshold_curves`, `normalize_answer`).
Letters: N questions, in the order of the examples; G different na_probs.
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
    """ "The U.S.-born  man" -> "usborn man"."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def question_scores(examples: list[Example], predictions: dict[str, str], is_v2: bool) -> tuple[np.ndarray, np.ndarray]:
    """EM and F1 of every question, before any threshold: two float64 arrays [N] of values in 0..1."""
    normalize = functools.cache(normalize_answer)  # golds repeat one another: each text is normalised once
    exact, f1 = np.zeros(len(examples)), np.zeros(len(examples))  # [N]
    for row, example in enumerate(examples):
        if example.id in predictions:
            prediction, golds = normalize(predictions[example.id]), [normalize(text) for text in example.gold_texts]
            if is_v2:
                golds = [gold for gold in golds if gold] or [""]
            exact[row] = prediction in golds
            f1[row] = max((_token_f1(prediction, gold, is_v2) for gold in golds), default=0.0)
    return exact, f1


def _token_f1(prediction: str, gold: str, is_v2: bool) -> float:
    """F1 of two normalised texts."""
    prediction_tokens, gold_tokens = prediction.split(), gold.split()
    if not prediction_tokens or not gold_tokens:
        return float(is_v2 and prediction_tokens == gold_tokens)
    num_common = sum((Counter(prediction_tokens) & Counter(gold_tokens)).values())
    if num_common == 0:
        return 0.0
    precision, recall = num_common / len(prediction_tokens), num_common / len(gold_tokens)
    return 2 * precision * recall / (precision + recall)


def final_scores(examples: list[Example], predictions: dict[str, str], is_v2: bool, na_probs: dict[str, float] | None = None,
                 na_threshold: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """EM and F1 of every question as the official figures count them, with the refusals of v2.0: two [N] of values in 0..1."""
    exact, f1 = question_scores(examples, predictions, is_v2)
    if is_v2:
        refused = is_refused(_na_prob_array(examples, predictions, na_probs or {}), na_threshold)  # [N]
        exact, f1 = (np.where(refused, ~_has_answer(examples), scores) for scores in (exact, f1))
    return exact, f1


def score_v1(examples: list[Example], predictions: dict[str, str]) -> dict[str, float]:
    """The official v1.1 figures, in percent over every question."""
    exact, f1 = question_scores(examples, predictions, is_v2=False)
    return {"exact_match": _percent(exact), "f1": _percent(f1), "total": len(examples)}


def is_refused(no_answer_score: float | np.ndarray, threshold: float) -> bool | np.ndarray:
    """Whether "no answer" replaces the prediction: only above the threshold, not at it."""
    return no_answer_score > threshold


def score_v2(examples: list[Example], predictions: dict[str, str], na_probs: dict[str, float] | None = None,
             na_threshold: float = 1.0) -> dict[str, float]:
    """The official v2.0 figures, in percent, under the official keys and in their order.

    `na_probs` are {id: no-answer score}, on any scale; higher means "no answer". With them there are best_* figures.
    """
    has_answer = _has_answer(examples)  # [N]
    exact, f1 = final_scores(examples, predictions, True, na_probs, na_threshold)  # [N], [N]
    metrics: dict[str, float] = {}
    for key, part in (("", has_answer | True), ("HasAns_", has_answer), ("NoAns_", ~has_answer)):
        if part.any():
            metrics |= {f"{key}exact": _percent(exact[part]), f"{key}f1": _percent(f1[part]), f"{key}total": int(part.sum())}
    if na_probs is not None:
        scores_if_accepted = question_scores(examples, predictions, is_v2=True)
        thresholds, *curves = threshold_curves(examples, predictions, na_probs, scores_if_accepted)
        for name, curve in zip(("exact", "f1"), curves, strict=True):
            best = int(curve.argmax())  # of equal ones the lowest, as in the official search
            metrics |= {f"best_{name}": 100.0 * float(curve[best]) / len(examples),
                        f"best_{name}_thresh": float(thresholds[best])}
    return metrics


def best_threshold(examples: list[Example], predictions: dict[str, str], na_probs: dict[str, float]) -> float:
    """The threshold with the highest F1 on these questions, to be used on other questions.

    If two have the same F1, the higher EM wins, then the lower threshold. Between two na_probs every threshold gives the same
    scores here; we return the middle, so that it is equally far from both. If it is best to refuse no question, we return the
    highest na_prob.
    """
    scores_if_accepted = question_scores(examples, predictions, is_v2=True)
    thresholds, exact, f1 = threshold_curves(examples, predictions, na_probs, scores_if_accepted)  # [G + 1] each
    best = max(range(len(thresholds)), key=lambda g: (round(f1[g], 9), round(exact[g], 9), -g))
    threshold = float(thresholds[best])
    if 0 < best < len(thresholds) - 1:
        middle = 0.5 * threshold + 0.5 * float(thresholds[best + 1])
        if threshold < middle < thresholds[best + 1]:  # two neighbouring floats have no float between them
            threshold = middle
    return threshold


def threshold_curves(examples: list[Example], predictions: dict[str, str], na_probs: dict[str, float],
                      scores_if_accepted: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every threshold that makes a difference, ascending, and the sum of EM and the sum of F1 at it: [G + 1] each.

    Only G + 1 thresholds differ in effect: one below all na_probs, which refuses every question that has one, then each
    na_prob, which accepts the questions up to it. So we start with all refused, where the sum is the number of unanswerable
    questions, and accept question after question, the lowest na_prob first. To accept one changes the sum by its score if
    accepted minus its score if refused. For example:

        na_prob   score if accepted   if refused    threshold    sum of the three
                                                    0.0          0 + 1 + 0 = 1
        0.1       1                   0             0.1          1 + 1 + 0 = 2      the best
        0.6       0                   1             0.6          1 + 0 + 0 = 1
        0.8       0.5                 0             0.8          1 + 0 + 0.5 = 1.5
    """
    na_prob, if_refused = _na_prob_array(examples, predictions, na_probs), ~_has_answer(examples)  # [N], [N]
    refusable = np.isfinite(na_prob)  # [N]
    levels, num_below = np.unique(np.sort(na_prob[refusable]), return_index=True)  # [G], [G]
    num_accepted = np.append(num_below, refusable.sum())  # [G + 1]
    below_all = np.nextafter(levels[0], -np.inf) if len(levels) and levels[0] <= 0 else 0.0  # officially always 0
    sums = []
    for scores in scores_if_accepted:
        all_refused = scores[~refusable].sum() + if_refused[refusable].sum()
        gains = (scores - if_refused)[refusable][np.argsort(na_prob[refusable], kind="stable")]
        sums.append(np.cumsum(np.append(all_refused, gains))[num_accepted])  # added one by one, as officially
    return np.append(below_all, levels), sums[0], sums[1]


def _na_prob_array(examples: list[Example], predictions: dict[str, str], na_probs: dict[str, float]) -> np.ndarray:
    """[N]; -inf (never refused) for a question without a na_prob, or without a prediction (which is wrong, not a refusal)."""
    array = np.array([na_probs.get(example.id, -np.inf) if example.id in predictions else -np.inf for example in examples],
                     dtype=np.float64)
    assert (array < np.inf).all(), "a no-answer score is not a finite number"
    return array


def _has_answer(examples: list[Example]) -> np.ndarray:
    """[N] bool: as officially, the golds decide and not the flag is_impossible."""
    return np.array([bool(example.gold_texts) for example in examples], dtype=bool)


def _percent(scores: np.ndarray) -> float:
    assert len(scores) > 0, "no question to score"
    return 100.0 * float(scores.sum()) / len(scores)
