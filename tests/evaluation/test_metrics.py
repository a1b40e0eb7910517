"""The official rules: by hand, against a second derivation, and (marked squad) against published figures."""

import json
import os
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from qa.data.squad import Example, load_squad
from qa.evaluation import metrics
from qa.evaluation.metrics import (
    best_threshold,
    normalize_answer,
    question_scores,
    score_v1,
    score_v2,
)

TEXTS = ["", "the", "A.", "cat", "Cat", "the cat", "cat sat", "cat cat sat", "sat, the cat!", "mat",
         "on a mat", "—", "“the”", "U.S.", "us", "1,000", "1000", "x–a–y", "an-the", "a cat\u00a0sat",
         "cat, on the mat cat"]


def make_example(question_id: str, *golds: str) -> Example:
    return Example(question_id, "question?", (), golds, not golds, True)


# A second derivation of the rules, character by character and without multisets.

def slow_normalise(text: str) -> str:
    kept = [char for char in text.lower() if not (ord(char) < 128 and unicodedata.category(char)[0] in "PS")]
    words, word = [], ""  # runs of word characters, and the other characters one by one
    for char in kept:
        if char.isalnum():
            word += char
        else:
            words += [word, char]
            word = ""
    words.append(word)
    return " ".join("".join(" " if word in ("a", "an", "the") else word for word in words).split())


def slow_score(prediction: str | None, golds: list[str], is_v2: bool) -> tuple[float, float]:
    if prediction is None:
        return 0.0, 0.0
    golds = [slow_normalise(gold).split() for gold in golds]
    if is_v2:
        golds = [gold for gold in golds if gold] or [[]]
    predicted, exact, f1 = slow_normalise(prediction).split(), 0.0, 0.0
    for gold in golds:
        exact = max(exact, float(predicted == gold))
        rest, common = list(gold), 0
        for token in predicted:
            if token in rest:
                rest.remove(token)
                common += 1
        if common:
            f1 = max(f1, 2 * common / (len(predicted) + len(gold)))
        elif is_v2 and not predicted and not gold:
            f1 = 1.0
    return exact, f1


def slow_v2(examples: list[Example], predictions: dict, na_probs: dict, threshold: float) -> tuple:
    """(exact, f1) in percent, with every question answered or refused by the rule."""
    scores = []
    for example in examples:
        prediction = predictions.get(example.id)
        if prediction is not None and na_probs.get(example.id, -np.inf) > threshold:
            scores.append((float(not example.gold_texts),) * 2)
        else:
            scores.append(slow_score(prediction, list(example.gold_texts), is_v2=True))
    return tuple(100 * np.mean(scores, axis=0))


def random_v2_case(rng: random.Random, levels: list[float]) -> tuple[list[Example], dict, dict]:
    examples = [make_example(str(i), *rng.choices(TEXTS, k=rng.choice([0, 0, 1, 2, 3])))
                for i in range(rng.randint(1, 12))]
    predictions = {example.id: rng.choice(["", *TEXTS, *example.gold_texts])
                   for example in examples if rng.random() < 0.9}
    na_probs = {example.id: rng.choice(levels) for example in examples if rng.random() < 0.95}
    return examples, predictions, na_probs


@pytest.mark.parametrize("text, expected", [
    ("The  Cat, an apple -- and A dog.", "cat apple and dog"),
    ("U.S.", "us"), ("1,000.50", "100050"), ("$5 (five)", "5 five"), ("well-known", "wellknown"),
    ("a–b", "–b"), ("“The”", "“ ”"), ("the-end", "theend"), ("then another", "then another"), ("'a'", ""),
    ("1754–1763", "1754–1763"), ("\tÄrger\u00a0an\nsich ", "ärger sich"), ("a_b", "ab"), ("", ""),
])
def test_normalisation_worked_by_hand(text, expected):
    assert normalize_answer(text) == expected == slow_normalise(text)


@pytest.mark.parametrize("prediction, gold, exact, f1_v1, f1_v2", [
    ("The Denver Broncos!", "denver broncos", 1, 1.0, 1.0),
    ("Denver Broncos, of Colorado", "The Denver Broncos", 0, 2 / 3, 2 / 3),  # as in the docstring of metrics.py
    ("Broncos", "Denver Broncos", 0, 2 / 3, 2 / 3),
    ("cat cat cat", "cat cat sat", 0, 2 / 3, 2 / 3),  # common 2 of 3: the third cat has no partner
    ("cat", "cat cat cat", 0, 0.5, 0.5),
    ("sat cat", "cat sat", 0, 1.0, 1.0),  # F1 ignores the order
    ("dog", "cat", 0, 0.0, 0.0),
    ("the", "a.", 1, 0.0, 1.0),  # both empty once normalised
    ("", "cat", 0, 0.0, 0.0),
    ("—", "-", 0, 0.0, 0.0),  # only ASCII punctuation is dropped
    ("1000", "1,000", 1, 1.0, 1.0),
    ("10", "10.0", 0, 0.0, 0.0),
])
def test_pair_scores_worked_by_hand(prediction, gold, exact, f1_v1, f1_v2):
    for is_v2, f1 in ((False, f1_v1), (True, f1_v2)):
        ([found_exact], [found_f1]) = question_scores([make_example("q", gold)], {"q": prediction}, is_v2)
        assert found_exact == exact and found_f1 == pytest.approx(f1, abs=1e-15)


def test_questions_worked_by_hand():
    examples = [make_example("two golds", "cat", "black cat"), make_example("empty gold", "the", "cat"),
                make_example("only empty golds", "the"), make_example("no gold"),
                make_example("missing", "cat"), make_example("missing, no gold")]
    predictions = {"two golds": "the black cat", "empty gold": "", "only empty golds": "", "no gold": "",
                   "not in the data": "cat"}
    v1, v2 = (question_scores(examples, predictions, is_v2) for is_v2 in (False, True))
    np.testing.assert_array_equal(v1, [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(v2, [[1, 0, 1, 1, 0, 0], [1, 0, 1, 1, 0, 0]])
    assert score_v1(examples, predictions) == {"exact_match": 50.0, "f1": 100 / 6, "total": 6}
    assert list(score_v2(examples, predictions).items()) == [
        ("exact", 50.0), ("f1", 50.0), ("total", 6),
        ("HasAns_exact", 50.0), ("HasAns_f1", 50.0), ("HasAns_total", 4),
        ("NoAns_exact", 50.0), ("NoAns_f1", 50.0), ("NoAns_total", 2)]


def test_parts_without_questions_have_no_figures():
    assert list(score_v2([make_example("q", "cat")], {"q": "cat"})) == [
        "exact", "f1", "total", "HasAns_exact", "HasAns_f1", "HasAns_total"]
    assert list(score_v2([make_example("q")], {"q": "cat"}, {"q": 0.5}))[3:] == [
        "NoAns_exact", "NoAns_f1", "NoAns_total",
        "best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"]


@pytest.mark.parametrize("is_v2", [False, True])
def test_question_scores_match_second_derivation(is_v2):
    rng = random.Random(3)
    for _ in range(300):
        examples, predictions, _ = random_v2_case(rng, [0.5])
        expected = [slow_score(predictions.get(example.id), list(example.gold_texts), is_v2)
                    for example in examples]
        scores = question_scores(examples, predictions, is_v2)
        assert scores[0].dtype == scores[1].dtype == np.float64
        np.testing.assert_allclose(np.transpose(scores), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("levels", [[0.5], [0.1, 0.5, 0.9], [-2.0, 0.0, 3.0], [0.0, 1e-300, 1.0],
                                    [i / 97 for i in range(97)]])
def test_best_figures_match_all_thresholds_and_are_realised(levels):
    rng = random.Random(4)
    for _ in range(150):
        examples, predictions, na_probs = random_v2_case(rng, levels)
        tried = [min(levels) - 1, *sorted(set(na_probs.values()))]
        reachable = np.array([slow_v2(examples, predictions, na_probs, threshold) for threshold in tried])
        found = score_v2(examples, predictions, na_probs, na_threshold=rng.choice(tried))
        for column, name in enumerate(["exact", "f1"]):
            assert found[f"best_{name}"] == pytest.approx(reachable[:, column].max(), abs=1e-9)
            realised = slow_v2(examples, predictions, na_probs, found[f"best_{name}_thresh"])
            assert realised[column] == pytest.approx(found[f"best_{name}"], abs=1e-9)


def test_refusal_is_strictly_above_the_threshold():
    examples, predictions = [make_example("q", "cat"), make_example("r")], {"q": "cat", "r": "cat"}
    assert score_v2(examples, predictions, {"q": 0.5, "r": 0.5}, 0.5)["exact"] == 50.0  # both answered
    assert score_v2(examples, predictions, {"q": 0.5, "r": 0.6}, 0.5)["exact"] == 100.0
    assert score_v2(examples, predictions, {"q": 0.6, "r": 0.6}, 0.5)["NoAns_f1"] == 100.0
    assert score_v2(examples, predictions, {"r": 0.6}, 0.5)["exact"] == 100.0  # q has no score: answered


def test_threshold_search_worked_by_hand():
    """The table in `threshold_curves`."""
    examples = [make_example("a", "cat"), make_example("b"), make_example("c", "cat sat on mat")]
    predictions, na_probs = {"a": "cat", "b": "dog", "c": "cat and sat dog"}, {"a": 0.1, "b": 0.6, "c": 0.8}
    scores = question_scores(examples, predictions, is_v2=True)
    thresholds, _, f1_sums = metrics.threshold_curves(examples, predictions, na_probs, scores)
    assert thresholds.tolist() == [0.0, 0.1, 0.6, 0.8] and f1_sums.tolist() == [1, 2, 1, 1.5]
    assert best_threshold(examples, predictions, na_probs) == pytest.approx(0.35)  # in the middle of 0.1 and 0.6


def test_constant_scores_have_no_best_but_all_or_nothing():
    examples = [make_example(str(i), *(["cat"] if i < 4 else [])) for i in range(10)]
    predictions = {example.id: "cat" for example in examples}
    found = score_v2(examples, predictions, dict.fromkeys(predictions, 0.3))
    assert (found["best_exact"], found["best_f1"]) == (60.0, 60.0)  # the official search says 100
    assert found["best_exact_thresh"] == found["best_f1_thresh"] == 0.0


def official_best(examples: list[Example], predictions: dict, scores: np.ndarray, na_probs: dict) -> tuple:
    """The official search as its rule says: from "all refused" accept one by one, keep the first best."""
    rows = sorted(range(len(examples)), key=lambda row: na_probs[examples[row].id])
    score = best = sum(not example.gold_texts for example in examples)
    threshold = 0.0
    for row in rows:
        no_answer = not examples[row].gold_texts
        score += (-1 if predictions[examples[row].id] else 0) if no_answer else scores[row]
        if score > best:
            best, threshold = score, na_probs[examples[row].id]
    return 100.0 * best / len(examples), threshold


def test_without_ties_the_best_figures_are_the_official_ones():
    rng = random.Random(5)
    for _ in range(200):
        examples, _, _ = random_v2_case(rng, [0.5])
        predictions = {example.id: rng.choice(["", "cat sat", "on a mat", "cat"]) for example in examples}
        na_probs = {example.id: rng.uniform(0.001, 2) for example in examples}
        found = score_v2(examples, predictions, na_probs)
        per_question = question_scores(examples, predictions, is_v2=True)
        for name, scores in zip(["exact", "f1"], per_question, strict=True):
            best, threshold = official_best(examples, predictions, scores, na_probs)
            assert found[f"best_{name}"] == pytest.approx(best, abs=1e-12)
            assert found[f"best_{name}_thresh"] == threshold


@pytest.mark.parametrize("levels", [[0.5], [0.1, 0.5, 0.9], [-7.25, -2.0, 0.0, 3.0],
                                    [1 + 2**-52, 1 + 2**-51]])  # neighbours; their mean rounds up
def test_chosen_threshold_has_the_best_f1_and_is_in_the_middle(levels):
    rng = random.Random(6)
    for _ in range(150):
        examples, predictions, na_probs = random_v2_case(rng, levels)
        threshold = best_threshold(examples, predictions, na_probs)
        found = score_v2(examples, predictions, na_probs, threshold)
        assert found["f1"] == pytest.approx(found["best_f1"], abs=1e-9)
        seen = sorted({na_probs[question_id] for question_id in na_probs if question_id in predictions})
        tried = [min(levels) - 1, *seen]
        pairs = [tuple(np.round(slow_v2(examples, predictions, na_probs, level), 7)) for level in tried]
        best = max(range(len(tried)), key=lambda i: (pairs[i][::-1], -i))  # F1, then EM, then the lowest
        if best == 0:
            assert not seen or threshold < seen[0]
        elif best == len(tried) - 1:
            assert threshold == seen[-1]
        else:
            assert threshold == pytest.approx((tried[best] + tried[best + 1]) / 2)
            assert tried[best] <= threshold < tried[best + 1]


def test_each_text_is_normalised_once(monkeypatch):
    seen = []
    monkeypatch.setattr(metrics, "normalize_answer", lambda text: seen.append(text) or text)
    examples = [make_example(str(i), "cat", "cat", "mat") for i in range(5)]
    question_scores(examples, {str(i): "cat" for i in range(5)}, is_v2=False)
    assert sorted(seen) == ["cat", "mat"]


@pytest.mark.squad
@pytest.mark.skipif("SQUAD_DIR" not in os.environ, reason="SQUAD_DIR is not set")
def test_published_systems_get_their_official_figures():
    folder = Path(os.environ.get("SQUAD_DIR", ""))
    num_figures = 0
    for name, reference in json.loads((folder / "scoring/expected.json").read_text()).items():
        examples = load_squad(str(folder / reference["dev_file"]), "dev").examples
        predictions = json.loads((folder / "scoring" / name).read_text())
        na_probs = folder / "scoring" / name.replace(".json", "-na.json")
        for variant, figures in reference.items():
            if variant == "dev_file":
                continue
            if variant == "v1.1":
                found = score_v1(examples, predictions)
            elif "without" in variant:
                found = score_v2(examples, predictions)
            else:
                threshold = 0.5 if "threshold 0.5" in variant else 1.0
                found = score_v2(examples, predictions, json.loads(na_probs.read_text()), threshold)
            assert list(found) == list(figures)
            for key, figure in figures.items():
                assert found[key] == pytest.approx(figure, abs=1e-9), (name, variant, key)
                num_figures += 1
    assert num_figures == 6 + 2 * (9 + 13 + 13)
