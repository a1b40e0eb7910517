"""What a run chooses on held-out articles, and what it leaves.

One worked case: held-out F1 50 at step 4, 90 at step 8, 70 at step 12: the product is that of step 8.
"""

from __future__ import annotations

import contextlib
import json
import math
from types import SimpleNamespace

import pytest

from qa.data.squad import parse_squad
from qa.errors import Stopped
from qa.prediction import Answered, Candidate, Prediction
from qa.training.evaluator import Evaluator
from qa.training.state import TrainState

CONTEXT = "one two three four five six seven eight nine ten zero"
WORDS = CONTEXT.split()[:10]


def make_data(source: str, is_v2: bool = False):
    """10 questions, answered by the words in turn; in v2.0 the last two have no answer."""
    qas = [{"id": word, "question": f"{word}?", "answers": [{"text": word, "answer_start": CONTEXT.index(word)}]}
           for word in WORDS]
    if is_v2:
        qas = [qa | {"is_impossible": False} for qa in qas[:8]] + [{"id": word, "question": "?", "answers": [],
                                                                     "is_impossible": True} for word in WORDS[8:]]
    return parse_squad({"version": "v2.0" if is_v2 else "1.1", "data": [
        {"title": "t", "paragraphs": [{"context": CONTEXT, "qas": qas}]}]}, source)


class FakeReader:
    """Answers the first `num_right` questions rightly. No-answer scores rise from question to question: 0, 1, ... 9."""

    def __init__(self):
        self.num_right, self.confidence, self.asked = 0, 0.5, []

    def answer(self, data) -> Answered:
        self.asked.append(data.source)
        predictions = []
        for number, example in enumerate(data.examples):
            text = example.id if number < self.num_right else "zero"
            start = max(CONTEXT.find(text), 0)
            candidate = Candidate(text, start, start + len(text), 1.0, self.confidence)
            predictions.append(Prediction(example.id, text, [candidate], float(number) if data.is_v2 else None))
        return Answered(predictions)


class FakeProduct:
    def __init__(self, tmp_path):
        self.folder, self.saved = tmp_path / "model", []

    def save(self, step, chosen, metrics):
        self.saved.append((step, chosen, metrics))

    def restore(self):
        return self.saved[-1][:2]


class FakeLog:
    total_steps, is_main = 12, True

    def __init__(self):
        self.said, self.events = [], []

    def say(self, text):
        self.said.append(text)

    def write(self, event, **values):
        self.events.append((event, values))

    def close(self):
        pass

    def clock_stopped(self):
        return contextlib.nullcontext()


@pytest.fixture
def make(tmp_path):
    def make_evaluator(held_out, dev_data, **options):
        values = {"eval_every": None, "demo": False, "dev_data": "dev.json", "shard": False, "kind": "lora"} | options
        return Evaluator(FakeReader(), FakeProduct(tmp_path), SimpleNamespace(**values), FakeLog(), TrainState(), held_out,
                         dev_data)

    return make_evaluator


def run(evaluator, scores: dict[int, int]) -> None:
    for step, num_right in scores.items():
        evaluator.state.step, evaluator.reader.num_right = step, num_right
        evaluator.evaluate()


def test_worked_case_the_best_on_held_out_articles_becomes_the_product(make):
    evaluator = make(make_data("held"), make_data("dev"))
    run(evaluator, {4: 5, 8: 9, 12: 7})
    assert [step for step, *_ in evaluator.product.saved] == [4, 8]
    assert (evaluator.state.best_f1, evaluator.state.best_step) == (pytest.approx(90.0), 8)
    evaluator.finish()
    step, chosen, metrics = evaluator.product.saved[-1]
    assert (step, chosen["na_threshold"]) == (8, None)
    assert metrics["held-out f1"] == pytest.approx(90.0) and metrics["total"] == 10
    assert evaluator.reader.asked == ["held"] * 3 + ["dev"]
    results = evaluator.product.folder.with_name("evaluation")
    assert json.loads((results / "conditions.json").read_text())["step"] == 8
    questions = json.loads((results / "per_question.json").read_text())
    assert [entry["exact"] for entry in questions.values()] == [1.0] * 7 + [0.0] * 3  # as FakeReader answers at the end


def test_of_equal_scores_the_first_stays(make):
    evaluator = make(make_data("held"), None)
    run(evaluator, {4: 5, 8: 5})
    assert [step for step, *_ in evaluator.product.saved] == [4]


def test_without_held_out_articles_the_last_weights_are_the_product_and_dev_data_chooses_nothing(make):
    evaluator = make(None, make_data("dev"))
    run(evaluator, {4: 9, 8: 5})
    assert evaluator.product.saved == [] and evaluator.state.best_f1 is None
    evaluator.finish()
    assert [step for step, *_ in evaluator.product.saved] == [8, 8]  # once more, with its scores


def test_without_held_out_articles_the_last_step_is_scored_once(make):
    """`finish` scores the dev data; the evaluation that --eval-every asks for at the last step would give the same figures."""
    evaluator = make(None, make_data("dev"), eval_every=4)
    assert [step for step in range(1, 13) if evaluator.is_due(step, epoch_ends=False)] == [4, 8]
    evaluator.state.step = 12
    evaluator.begin({}, epoch_ends=True)  # a run that was killed after its last checkpoint
    evaluator.finish()
    assert evaluator.reader.asked == ["dev"]
    assert [(values["when"], values["step"]) for _, values in evaluator.log.events] == [("after training", 12)]
    assert make(make_data("held"), None, eval_every=4).is_due(12, epoch_ends=False)


def test_the_threshold_is_chosen_on_held_out_articles_and_used_on_dev(make):
    """8 right answers with no-answer scores 0 to 7, two refusals due at 8 and 9: the threshold is between 7 and 8."""
    evaluator = make(make_data("held", True), make_data("dev", True))
    run(evaluator, {4: 8})
    evaluator.finish()
    assert evaluator.product.saved[-1][1]["na_threshold"] == pytest.approx(7.5)
    assert evaluator.log.events[-1][1]["exact"] == 100.0


def test_a_run_shorter_than_eval_every_still_chooses(make):
    evaluator = make(make_data("held", True), None, eval_every=100)
    evaluator.state.step, evaluator.reader.num_right = 7, 8
    assert not evaluator.is_due(7, epoch_ends=True) and evaluator.is_due(200, epoch_ends=False)
    evaluator.finish()
    step, chosen, _ = evaluator.product.saved[0]
    assert (step, chosen["na_threshold"]) == (7, pytest.approx(7.5))


def test_the_temperature_is_fitted_on_held_out_articles_and_kept_for_the_product(make):
    """9 of 10 right, all with a confidence of 0.6, which T shall make 0.9: the log odds log(1.5) / T = log(9)."""
    evaluator = make(make_data("held"), make_data("dev"))
    evaluator.reader.confidence = 0.6
    run(evaluator, {4: 9})
    evaluator.finish()
    assert evaluator.product.saved[-1][1]["temperature"] == pytest.approx(math.log(1.5) / math.log(9), rel=1e-6)
    assert evaluator.log.events[-1][1]["ece"] == pytest.approx(0.0, abs=1e-9)
    assert evaluator.log.events[-1][1]["ece_uncalibrated"] == pytest.approx(0.3)


def test_only_a_demo_shows_marked_answers(make):
    for demo in (False, True):
        evaluator = make(None, make_data("dev"), demo=demo)
        evaluator.reader.num_right = 10
        evaluator.finish()
        assert ("[[one]]" in "\n".join(evaluator.log.said)) == demo


@pytest.mark.parametrize("kind, shard, command", [
    ("lora", True, "torchrun --nproc_per_node=N evaluate.py --shard --ckpt"), ("lora", False, "\n  python evaluate.py --ckpt"),
    ("bert", True, "\n  python evaluate.py --ckpt")])
def test_the_last_line_says_how_to_evaluate(kind, shard, command, make):
    evaluator = make(None, None, kind=kind, shard=shard)
    run(evaluator, {12: 1})
    evaluator.state.updates = 12
    evaluator.finish()
    assert command in evaluator.log.said[-1]


def test_a_run_whose_updates_were_mostly_skipped_leaves_no_product(make):
    evaluator = make(None, None)
    evaluator.state = TrainState(step=12, updates=1, skipped=11)
    with pytest.raises(Stopped, match="^11 of 12 updates were skipped"):
        evaluator.finish()
    assert evaluator.product.saved == []


def test_a_resumed_run_makes_the_evaluation_that_is_due_at_its_checkpoint(make):
    evaluator = make(make_data("held"), make_data("dev"), demo=True)
    evaluator.begin({"before training": evaluator.reader}, epoch_ends=True)
    assert evaluator.reader.asked == ["dev"]  # a new demo
    evaluator.state.step = 4
    for epoch_ends, asked in ((False, []), (True, ["held"])):
        evaluator.reader.asked = []
        evaluator.begin({"before training": evaluator.reader}, epoch_ends)
        assert evaluator.reader.asked == asked
