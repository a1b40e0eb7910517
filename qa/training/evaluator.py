"""Evaluation inside a run: on held-out articles while it trains, on the development data at its end.

With held-out articles, the product has the weights that were best on them; without, the last weights. The no-answer
threshold of v2.0 and the temperature of the confidences are chosen on them too: nothing is chosen on the data that is
reported. Used by both train scripts.
"""

from __future__ import annotations

from qa.data.squad import SquadData
from qa.errors import Stopped
from qa.evaluation.calibration import calibrate
from qa.evaluation.results import result_files, write_results
from qa.evaluation.scoring import choose_temperature, choose_threshold, score_predictions
from qa.evaluation.show import marked_passages, metrics_line
from qa.options import TrainOptions
from qa.prediction import Prediction, Reader
from qa.training.log import RunLog
from qa.training.product import Product
from qa.training.state import TrainState


class Evaluator:
    def __init__(self, reader: Reader, product: Product, options: TrainOptions, log: RunLog, state: TrainState,
                 held_out: SquadData | None, dev_data: SquadData | None) -> None:
        self.reader, self.product, self.options, self.log, self.state = reader, product, options, log, state
        self.held_out = held_out
        self.dev_data = dev_data if dev_data is not None and dev_data.has_answers else None
        if self.dev_data is None:
            log.say(f"not scored at the end: {dev_data.source} has no answers" if dev_data else
                    "not scored at the end: no --dev-data")

    def begin(self, readers: dict[str, Reader], epoch_ends: bool) -> None:
        """Before the first step: a new demo scores the dev data; a resumed run evaluates its checkpoint, if that is due.

        The run saves a step before it evaluates it. So nobody knows whether the step's evaluation was done before the stop.

        readers: name -> reader, all scored before a demo's training (LLaMA: one for each prompt).
        """
        with self.log.clock_stopped():
            if self.state.step > 0:
                if self.is_due(self.state.step, epoch_ends):
                    self.evaluate()
            elif self.options.demo and self.dev_data is not None:
                for name, reader in readers.items():
                    self.score_dev(name, reader)

    def is_due(self, step: int, epoch_ends: bool) -> bool:
        if self.held_out is None and step == self.log.total_steps:
            return False  # `finish` scores the dev data
        every = self.options.eval_every
        return step % every == 0 if every else epoch_ends and self.held_out is not None

    def evaluate(self) -> None:
        """Between two steps. Held-out articles choose the product; without any, the dev data's scores are shown."""
        if self.held_out is not None:
            self.choose()
        elif self.dev_data is not None:
            self.score_dev(f"step {self.state.step}")

    def choose(self) -> None:
        """Score the held-out articles; weights that beat all earlier ones become the product."""
        state, data = self.state, self.held_out
        predictions = self.reader.answer(data).predictions
        threshold = choose_threshold(data, predictions) if data.is_v2 else None
        chosen = {"na_threshold": threshold, "temperature": choose_temperature(data, predictions, threshold)}
        metrics = self._report(f"step {state.step}", data, predictions, chosen)
        if state.best_f1 is None or metrics["f1"] > state.best_f1:
            state.best_f1, state.best_step = metrics["f1"], state.step
            self.product.save(state.step, chosen, {f"held-out {key}": value for key, value in metrics.items()})

    def finish(self) -> None:
        """Leave the product, score it on the dev data, and say how to evaluate it."""
        state, step, chosen, metrics = self.state, self.state.step, {}, {}
        if state.skipped > state.updates:  # fp16 only
            self.log.close()
            raise Stopped(f"{state.skipped} of {state.step} updates were skipped because gradients overflowed, so there is no "
                          "model; lower --lr, or use --precision bf16 or fp32")
        if self.held_out is not None and state.best_f1 is None:  # a run shorter than --eval-every
            self.choose()
        if state.best_f1 is None:
            self.product.save(step, {}, {})
        else:
            step, chosen = self.product.restore()
            metrics["held-out f1"] = state.best_f1
        if self.dev_data is not None:
            metrics |= self.score_dev("after training", chosen=chosen, show=3 if self.options.demo else 0, product_step=step)
            self.product.save(step, chosen, metrics)  # again, with the scores in its model card
        run = self.product.folder.parent
        is_cut = self.options.shard and self.options.kind == "lora"  # a BERT that only reads needs a quarter of the memory
        command = "torchrun --nproc_per_node=N evaluate.py --shard" if is_cut else "python evaluate.py"
        self.log.say(f"the model is in {self.product.folder}; evaluate it with:\n  {command} --ckpt {run} --data "
                     f"{self.options.dev_data or 'DATA'}\nor ask it about a text of yours:\n  python -m qa.ask --ckpt {run} "
                     'FILE.md "QUESTION?"')

    def score_dev(self, when: str, reader: Reader | None = None, chosen: dict[str, float | None] | None = None,
                  show: int = 0, product_step: int | None = None) -> dict[str, float]:
        """Score the dev data and print the figures, then `show` questions with the answers marked in their passages.

        product_step: of the product's weights. If it is given, the run's folder evaluation/ gets the files of an evaluation.
        """
        data, chosen, answered = self.dev_data, chosen or {}, (reader or self.reader).answer(self.dev_data)
        metrics = self._report(when, data, answered.predictions, chosen)
        threshold = (chosen.get("na_threshold") or 0.0) if data.is_v2 else None
        if product_step is not None and self.log.is_main:
            predictions, run = calibrate(answered.predictions, threshold, chosen.get("temperature")), self.product.folder.parent
            conditions = {"ckpt": str(run), "data": data.source, "questions": len(data.examples), "step": product_step,
                          **answered.conditions, **chosen, "na_threshold": threshold}
            write_results(run / "evaluation", {**result_files(data, predictions, threshold), "metrics.json": metrics,
                                               "conditions.json": conditions})
        if show:
            self.log.say(marked_passages(data, answered.predictions, show, threshold))
        return metrics

    def _report(self, when: str, data: SquadData, predictions: list[Prediction],
                chosen: dict[str, float | None]) -> dict[str, float]:
        metrics = score_predictions(data, predictions, chosen.get("na_threshold"), chosen.get("temperature"))
        self.log.write("evaluation", when=when, step=self.state.step, data=data.source, **chosen, **metrics)
        self.log.say(f"{when}, {data.source}: {metrics_line(metrics)}")
        return metrics
