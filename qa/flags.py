"""The command line: flags are made from the fields of qa/options.py, parsed, and checked.

    options, typed = parse(BertOptions, description)     # typed: the names of the options that the user typed

Every wrong value is one line that names the flag, what was found and what was expected. A flag of another program
(transformers, peft, Google's BERT) is answered with ours. Used by: every script, qa/reader.py (`check`, `unused_options`).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import typing
from typing import Any

from qa.errors import UserError
from qa.options import OWN_DEV, TrainOptions, flag

# our option -> how other programs (transformers, peft, Google's BERT) call it
THEIRS = {
    "overlap": "doc_stride stride", "max_length": "max_seq_length max_seq_len", "max_answer_length": "max_new_tokens",
    "lr": "learning_rate", "epochs": "num_train_epochs num_epochs", "warmup": "warmup_ratio warmup_steps warmup_proportion",
    "batch_size": "per_device_train_batch_size train_batch_size per_gpu_train_batch_size", "clip": "max_grad_norm",
    "micro_tokens": "gradient_accumulation_steps per_device_eval_batch_size eval_batch_size predict_batch_size",
    "model": "model_name_or_path", "ckpt": "model_name_or_path model model_path", "train_data": "dataset_name train_file",
    "dev_data": "validation_file predict_file", "data": "dataset_name validation_file predict_file dev_data",
    "out": "output_dir", "resume": "resume_from_checkpoint", "save_every": "save_steps", "keep": "save_total_limit",
    "eval_every": "eval_steps", "log_every": "logging_steps", "max_train_questions": "max_train_samples",
    "max_questions": "max_eval_samples", "num_best": "n_best_size", "na_threshold": "null_score_diff_threshold",
    "precision": "fp16 bf16 dtype torch_dtype", "rank": "lora_r lora_rank r", "alpha": "lora_alpha", "target": "target_modules",
}


def parse(cls: type, description: str, demo: dict[str, Any] | None = None,
          argv: list[str] | None = None) -> tuple[Any, set[str]]:
    """Parse the command line into a `cls`: the options, and the names of those that the user typed.

    `description` is what --help shows first. `demo` holds the values that --demo sets where the user typed none. `dev_data` is
    resolved: None means none. An unknown flag, a value of the wrong type or a missing one is a UserError.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = functools.partial(_refuse, cls)  # argparse itself would print its usage and exit; our errors are one line
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        _add_argument(parser, field, kinds[field.name])
    if bad := [word for word in (sys.argv[1:] if argv is None else argv) if word.endswith("=--")]:  # argparse stumbles over it
        raise UserError(f"{bad[0]}: no value; expected one, or leave the flag out")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(parser.parse_args(argv)).items()}
    typed = set(values)
    if empty := [name for name in values if isinstance(values[name], str) and not values[name].strip()]:
        raise UserError(f"{flag(empty[0])} {values[empty[0]]}: no such file or name; expected a value, or leave the flag out")
    if {"epochs", "max_steps"} <= typed:
        raise UserError("--epochs and --max-steps: each says how long to train; give one of the two")
    if values.get("demo") and demo:
        values = {**demo, **values}
    if values.get("dev_data", "none") == "none" and issubclass(cls, TrainOptions):
        own = values.get("train_data", cls.train_data)
        values["dev_data"] = own if own in OWN_DEV and "dev_data" not in values else None
    options = cls(**values)
    check(options)
    return options, typed


def unused_options(options: Any, typed: set[str], parts: set[str], model: str) -> list[str]:
    """A warning for each typed option that no running part uses. `parts`: those that run.

    A strict option is a UserError instead.
    """
    lines = []
    for field in dataclasses.fields(options):
        only = field.metadata["only"]
        if field.name in typed and only and not only & parts:
            lines.append(f"{flag(field.name)} has no effect on {model}")
            if field.metadata["strict"]:
                parts_named = " or ".join(sorted(only)).replace("exact", "--decode exact")
                raise UserError(f"{lines[-1]}: it is for {parts_named}; leave it out")
    return lines


def _add_argument(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: Any) -> None:
    help = field.metadata["help"].replace("%", "%%")
    kind = (typing.get_args(kind) or (kind,))[0]  # int | None -> int
    if field.metadata["positional"]:
        parser.add_argument(field.name, nargs="*", help=help, metavar=field.name.upper())
        return
    if kind is bool:
        parser.add_argument(flag(field.name), action="store_true", help=help)
        return
    shown = f" [{field.default}]" if field.default is not None else ""
    bare = {"nargs": "?", "const": field.metadata["bare"]} if field.metadata["bare"] else {}
    parser.add_argument(flag(field.name), type=kind, help=help + shown, choices=field.metadata["choices"], **bare,
                        metavar=None if field.metadata["choices"] else kind.__name__.upper())


def _refuse(cls: type, message: str) -> typing.NoReturn:
    """argparse's message; of a flag that another program has, or one with "_" for "-", which of ours it is."""
    fields = cls.__dataclass_fields__
    for word in message.split() if message.startswith("unrecognized") else ():
        name = word.lstrip("-").partition("=")[0].replace("-", "_")
        ours = [field for field in fields if word.startswith("--") and name in (field, *THEIRS.get(field, "").split())]
        if ours:
            raise UserError(f"{word}: here {flag(ours[0])}: {fields[ours[0]].metadata['help']}; see --help")
    raise UserError(f"{message}; see --help")


# (what must hold, in words; the test; the options that it is for, in every class that has them)
_RANGES = [
    ("at least 1", lambda value: value >= 1, "batch_size epochs max_steps keep log_every rank max_answer_length num_best top"),
    ("at least 8 tokens", lambda value: value >= 8, "max_length"),
    ("0 or more", lambda value: value >= 0, "clip overlap shots micro_tokens max_expansions max_train_questions max_questions "
                                            "save_every eval_every stop_after cache_mb"),
    ("0 or more", lambda value: value >= 0, "seed data_seed weight_decay"),
    ("a positive number", lambda value: value > 0, "lr alpha"),
    ("a share from 0 to 1", lambda value: 0 <= value <= 1, "warmup"),
    ("from 0 to below 1", lambda value: 0 <= value < 1, "held_out dropout lora_dropout"),
]


def check(options: Any) -> None:
    """Raise a UserError if a value has the wrong type or is out of its range, or if two values do not go together."""
    kinds = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value, choices, kind = getattr(options, field.name), field.metadata["choices"], kinds[field.name]
        if not isinstance(value, kind | int if kind in (float, float | None) else kind):
            raise UserError(f"{flag(field.name)} {value!r}: expected {getattr(kind, '__name__', kind)}")
        if choices and value is not None and value not in choices:
            raise UserError(f"{flag(field.name)} {value}: expected one of {', '.join(choices)}")
        limit = 1e38 if isinstance(value, float) else 2**63 if field.name.endswith("seed") else 2**31  # what torch can hold
        if isinstance(value, int | float) and not abs(value) < limit:
            raise UserError(f"{flag(field.name)} {value}: expected a number below {limit:.3g}")
        for words, holds, names in _RANGES:
            if field.name in names.split() and value is not None and not holds(value):
                raise UserError(f"{flag(field.name)} {value}: expected {words}")
    if getattr(options, "resume", None) == "auto" and options.out is None:
        raise UserError("--resume auto: expected --out, so that it is the same run each time; name the run's folder")
    if getattr(options, "shots", 0) and options.prompt != "engineered":
        raise UserError("--shots: the plain prompt shows no examples; use --prompt engineered")
    for other in ("compile", "merge_into") if getattr(options, "shard", False) else ():
        if getattr(options, other, None):
            raise UserError(f"--shard and {flag(other)} do not work together; give one of the two")
    if getattr(options, "shard", False) and os.environ.get("WORLD_SIZE", "1") == "1":
        raise UserError("--shard: one process holds the whole model; start several by torchrun, or leave the flag out")
