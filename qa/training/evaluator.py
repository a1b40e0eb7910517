"""Evaluation inside a run: on held-out articles while it trains, on the development data at its end.

With held-out articles the product is the best checkpoint on them; without, the last weights. The no-answer threshold of
v2.0 is chosen on them too: nothing is chosen on the data that is reported. Used by both train scripts, each of which hands
in its product (bert/product.py, llama/product.py): something that predicts, saves and restores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from qa.data.squad import SquadData
from qa.evaluation.metrics import best_threshold
from qa.evaluation.show import marked_passages, metrics_line
from qa.options import TrainOptions
from qa.predict import Prediction, answers, score
from qa.training.log import RunLog


class Product(Protocol):
    """What a run makes. All ranks call all methods: each predicts its share, rank 0 writes."""

    folder: Path

    def predict(self, data: SquadData) -> list[Prediction]: ...

    def save(self, step: int, na_threshold: float | None, metrics: dict[str, Any]) -> None: ...

    def restore(self) -> tuple[int, float | None]:
        """Load the saved weights back; returns their step and no-answer threshold."""


class Evaluator:
    def __init__(self, product: Product, options: TrainOptions, log: RunLog, held_out: SquadData | None,
                 dev_data: SquadData | None) -> None:
        self.product, self.options, self.log = product, options, log
        self.held_out, self.dev_data = held_out, dev_data

    def is_due(self, step: int, epoch_ends: bool) -> bool:
        every = self.options.eval_every
        return step % every == 0 if every else epoch_ends and self.held_out is not None

    def held_out_score(self, progress: dict[str, Any]) -> None:
        """Score the held-out articles; the best so far becomes the product. Without any, the dev data, to look at."""
        data = self.held_out or self.dev_data
        if data is None or not data.has_answers:
            return
        predictions = self.product.predict(data)
        threshold = _choose_threshold(data, predictions) if data is self.held_out and data.is_v2 else None
        metrics = self._report(f"step {progress['step']}", data, predictions, progress, threshold)
        best = progress["best_f1"]
        if data is self.held_out and (best is None or metrics["f1"] > best):
            progress["best_f1"] = metrics["f1"]
            self.product.save(progress["step"], threshold, {f"held-out {key}": value for key, value in metrics.items()})

    def finish(self, progress: dict[str, Any]) -> None:
        """Leave the product, score it on the dev data, and say what comes next."""
        step, threshold, metrics = progress["step"], None, {}
        if self.held_out is not None and progress["best_f1"] is None:  # a run shorter than --eval-every
            self.held_out_score(progress)
        if progress["best_f1"] is None:
            self.product.save(step, None, {})
        else:
            step, threshold = self.product.restore()
            metrics["held-out f1"] = progress["best_f1"]
        if self.dev_data is not None and self.dev_data.has_answers:
            metrics |= self.score_dev("after training", progress, threshold)
            self.product.save(step, threshold, metrics)  # once more, for its model card
        self.log.say(f"the model: {self.product.folder}; evaluate it with:\n  python evaluate.py --ckpt "
                     f"{self.options.out} --data {self.options.dev_data or 'DATA'}")

    def score_dev(self, when: str, progress: dict[str, Any], threshold: float | None = None) -> dict[str, float]:
        """Score the dev data and say so; after a demo's training a few answers are marked in their passages."""
        predictions = self.product.predict(self.dev_data)
        metrics = self._report(when, self.dev_data, predictions, progress, threshold)
        if self.options.demo and when.startswith("after"):
            self.log.say(marked_passages(self.dev_data.examples, predictions, 3))
        return metrics

    def _report(self, when: str, data: SquadData, predictions: list[Prediction], progress: dict[str, Any],
                threshold: float | None) -> dict[str, float]:
        metrics = score(data, predictions, threshold)
        self.log.say(f"{when}, {data.source}: {metrics_line(metrics)}")
        self.log.write("evaluation", when=when, step=progress["step"], data=data.source, na_threshold=threshold, **metrics)
        return metrics


def _choose_threshold(data: SquadData, predictions: list[Prediction]) -> float:
    na_scores = {prediction.id: prediction.no_answer_score for prediction in predictions
                 if prediction.no_answer_score is not None}
    return best_threshold(data.examples, answers(predictions, None), na_scores)[0]
