"""Options: every field is a flag and back, wrong ones are refused in one line, and what makes a run another run."""

from __future__ import annotations

import dataclasses
import json

import pytest

from qa.errors import UserError
from qa.flags import THEIRS, parse, unused_options
from qa.options import (
    DEMO_BERT,
    DEMO_LLAMA,
    AskOptions,
    BertOptions,
    EvaluateOptions,
    LlamaOptions,
    TrainOptions,
    differences,
    flag,
    settings_typed,
)

CLASSES = [TrainOptions, BertOptions, LlamaOptions, EvaluateOptions, AskOptions]
FIELDS = [(cls, field) for cls in CLASSES for field in dataclasses.fields(cls) if not field.metadata["positional"]]
NAMES = [f"{cls.__name__}-{field.name}" for cls, field in FIELDS]


def other_value(field: dataclasses.Field):
    """A legal value that is not the default."""
    if field.metadata["choices"]:
        return next(choice for choice in reversed(field.metadata["choices"]) if choice != field.default)
    return {"bool": True, "int": 9, "float": 0.25, "str": "some/where"}[kind(field)]


def kind(field: dataclasses.Field) -> str:
    """"int" of an int or an int | None."""
    return field.type.removesuffix(" | None")


def defaults(cls: type, **values):
    """Without flags the development data is squad's own."""
    return cls(**({"dev_data": "squad"} if issubclass(cls, TrainOptions) else {}) | values)


def parse_flags(cls: type, *argv: str, presets: dict | None = None):
    return parse(cls, "a script", presets, argv=list(argv))


def refusal(cls: type, *argv: str) -> str:
    with pytest.raises(UserError) as error:
        parse_flags(cls, *argv)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("cls", CLASSES)
def test_no_flags_give_the_defaults(cls):
    assert parse_flags(cls) == (defaults(cls), set())


@pytest.mark.parametrize("flags, expected", [
    ((), "squad"), (("--train-data", "squad_v2"), "squad_v2"), (("--train-data", "mine.json"), None),
    (("--dev-data", "none"), None), (("--train-data", "mine.json", "--dev-data", "squad"), "squad"), (("--demo",), "demo")])
def test_development_data_is_by_default_that_of_the_training_data(flags, expected):
    assert parse_flags(BertOptions, *flags, presets=DEMO_BERT)[0].dev_data == expected


@pytest.mark.parametrize("cls, field", FIELDS, ids=NAMES)
def test_every_field_is_a_flag(cls, field, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # --shard needs processes
    value = other_value(field)
    argv = [flag(field.name)] if value is True else [flag(field.name), str(value)]
    needs = {"prompt": "engineered"} if field.name == "shots" else {}
    options, typed = parse_flags(cls, *argv, *(word for name in needs for word in (flag(name), needs[name])))
    values = ({"dev_data": None} if field.name == "train_data" and issubclass(cls, TrainOptions) else {}) | needs
    assert options == defaults(cls, **values | {field.name: value}) and typed == {field.name, *needs}
    assert type(getattr(options, field.name)).__name__ == kind(field)


@pytest.mark.parametrize("cls", CLASSES)
def test_help_names_every_flag_with_its_help_and_default(cls, capsys):
    def without_spaces(text: str) -> str:  # argparse also begins a new line at a hyphen
        return "".join(text.split())

    with pytest.raises(SystemExit) as end:
        parse(cls, "What the script does, and 100% of it.\n\n    python script.py --flag", argv=["--help"])
    assert end.value.code == 0
    text = without_spaces(capsys.readouterr().out)
    assert without_spaces("What the script does, and 100% of it. python script.py --flag") in text
    for field in dataclasses.fields(cls):
        name = field.name.upper() if field.metadata["positional"] else flag(field.name)
        assert name in text and without_spaces(field.metadata["help"]) in text
        if type(field.default) is int:
            assert without_spaces(f"{field.metadata['help']}[{field.default}]") in text


def test_flag_wording():
    assert flag("max_train_questions") == "--max-train-questions"


@pytest.mark.parametrize("cls, presets", [(BertOptions, DEMO_BERT), (LlamaOptions, DEMO_LLAMA)])
def test_demo_sets_what_the_user_did_not(cls, presets):
    options, typed = parse(cls, "a script", presets, argv=["--demo"])
    assert options == cls(**presets, dev_data="demo", demo=True) and typed == {"demo"}
    options, typed = parse(cls, "a script", presets, argv=["--epochs", "7", "--demo", "--out", "x"])
    assert options == cls(**(presets | {"epochs": 7, "out": "x"}), dev_data="demo", demo=True)
    assert typed == {"epochs", "demo", "out"}
    # Also where the user's value is the default, which the preset would have replaced.
    default = cls().model
    options, _ = parse(cls, "a script", presets, argv=["--demo", "--model", default])
    assert options.model == default != presets["model"]
    options, _ = parse_flags(cls, "--epochs", "7", presets=presets)
    assert options == defaults(cls, epochs=7)  # no --demo, no presets


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not AskOptions])
@pytest.mark.parametrize("argv, parts", [
    (["--learning-rate", "1"], ["--learning-rate"]),  # unknown
    (["--batch-siz", "4"], ["--batch-siz"]),  # an abbreviation is no flag: a new option would change what it means
    (["squad"], ["squad"]),  # no flag at all
    (["--seed"], ["--seed", "expected one argument"]),
    (["--seed", "x1"], ["--seed", "'x1'"]),
    (["--seed", "1.5"], ["--seed", "'1.5'"]),
    (["--precision", "int8"], ["--precision", "'int8'", "bf16"]),
])
def test_wrong_flags_are_refused_in_one_line(cls, argv, parts):
    message = refusal(cls, *argv)
    assert all(part in message for part in parts) and "--help" in message, message


@pytest.mark.parametrize("cls, name, value", [
    (TrainOptions, "batch_size", "0"), (TrainOptions, "epochs", "0"), (TrainOptions, "epochs", "-1"),
    (TrainOptions, "lr", "0"), (TrainOptions, "lr", "-0.1"), (TrainOptions, "lr", "nan"), (TrainOptions, "lr", "inf"),
    (TrainOptions, "warmup", "1.1"), (TrainOptions, "warmup", "-0.1"), (TrainOptions, "warmup", "nan"),
    (TrainOptions, "weight_decay", "-1"), (TrainOptions, "clip", "-1"), (TrainOptions, "clip", "nan"),
    (TrainOptions, "held_out", "1"), (TrainOptions, "held_out", "-0.5"), (TrainOptions, "keep", "0"),
    (TrainOptions, "log_every", "0"), (TrainOptions, "micro_tokens", "-1"), (TrainOptions, "save_every", "-1"),
    (TrainOptions, "eval_every", "-1"), (TrainOptions, "stop_after", "-1"), (TrainOptions, "max_train_questions", "-5"),
    (BertOptions, "max_length", "0"), (BertOptions, "max_length", "7"), (BertOptions, "overlap", "-1"),
    (BertOptions, "dropout", "1"), (BertOptions, "dropout", "-0.5"), (BertOptions, "max_answer_length", "0"),
    (LlamaOptions, "rank", "0"), (LlamaOptions, "alpha", "0"), (LlamaOptions, "lora_dropout", "1"),
    (LlamaOptions, "shots", "-1"), (LlamaOptions, "max_length", "7"),
    (EvaluateOptions, "num_best", "-1"), (EvaluateOptions, "max_expansions", "-1"), (EvaluateOptions, "max_questions", "-1"),
])
def test_values_out_of_range_are_refused_in_one_line(cls, name, value):
    message = refusal(cls, f"{flag(name)}={value}")
    number = {"int": int, "float": float}[kind(cls.__dataclass_fields__[name])](value)
    assert message.startswith(f"{flag(name)} {number}: expected "), message


@pytest.mark.parametrize("cls, argv, words", [
    (BertOptions, ["--doc_stride", "64"], "--doc_stride: here --overlap: passage tokens that two"),
    (LlamaOptions, ["--doc-stride=64"], "--doc-stride=64: here --overlap: "),
    (EvaluateOptions, ["--doc-stride", "64"], "--doc-stride: here --overlap: "),
    (BertOptions, ["--gradient_accumulation_steps", "2"], "here --micro-tokens: tokens, with padding"),
    (BertOptions, ["--max-seq-length", "384"], "here --max-length: "), (BertOptions, ["--learning-rate", "1"], "here --lr: "),
    (BertOptions, ["--num-train-epochs", "2"], "here --epochs: "), (BertOptions, ["--output_dir", "x"], "here --out: "),
    (BertOptions, ["--per-device-train-batch-size", "8"], "here --batch-size: "),
    (BertOptions, ["--batch_size", "8"], "--batch_size: here --batch-size: "),
    (EvaluateOptions, ["--model_name_or_path", "x"], "here --ckpt: "), (LlamaOptions, ["--lora_r", "8"], "here --rank: "),
    (EvaluateOptions, ["--learning-rate", "1"], "unrecognized arguments: --learning-rate 1; see --help"),
    (BertOptions, ["--no-such-flag", "--lr", "1"], "unrecognized arguments: --no-such-flag; see --help")])
def test_a_flag_of_another_program_is_refused_with_the_name_of_ours(cls, argv, words):
    assert words in refusal(cls, *argv)


def test_every_name_in_the_table_is_of_no_flag_of_ours_and_leads_to_one():
    for ours, theirs in THEIRS.items():
        classes = [cls for cls in CLASSES if ours in cls.__dataclass_fields__]
        assert classes and not any(name in cls.__dataclass_fields__ for cls in classes for name in theirs.split())


def test_either_epochs_or_max_steps():
    assert refusal(BertOptions, "--epochs", "2", "--max-steps", "9").startswith("--epochs and --max-steps: ")
    options, _ = parse_flags(BertOptions, "--max-steps", "9", "--demo", presets=DEMO_BERT)
    assert options.max_steps == 9
    assert refusal(BertOptions, "--max-steps", "0") == "--max-steps 0: expected at least 1"


@pytest.mark.parametrize("argv, value", [
    ([], None), (["--resume"], "yes"), (["--resume", "--out", "x"], "yes"), (["--out", "x", "--resume", "auto"], "auto")])
def test_resume_takes_a_value_or_none(argv, value):
    assert parse_flags(BertOptions, *argv)[0].resume == value
    assert refusal(BertOptions, "--resume", "auto").startswith("--resume auto: expected --out")
    assert "'ever'" in refusal(BertOptions, "--resume", "ever")


def test_limits_themselves_are_allowed():
    parse_flags(BertOptions, "--warmup=1", "--held-out=0", "--clip=0", "--dropout=0", "--weight-decay=0", "--max-length=8",
                "--overlap=0", "--save-every=0", "--keep=1", "--log-every=1", "--batch-size=1", "--epochs=1")


def test_a_negative_threshold_can_be_given():
    options, typed = parse(EvaluateOptions, "a script", argv=["--na-threshold", "-2.5"])
    assert options.na_threshold == -2.5 and typed == {"na_threshold"}


# ---- what makes a run another run ------------------------------------------------------------------------------------

@pytest.mark.parametrize("cls", [BertOptions, LlamaOptions])
def test_a_record_read_back_from_its_file_differs_in_nothing(cls):
    options = dataclasses.replace(cls(), lr=1 / 3, held_out=0.1, model="Zürich", seed=2**40)
    recorded = json.loads(json.dumps(dataclasses.asdict(options)))
    assert differences(options, recorded) == []
    assert differences(options, recorded | {"examples": "a fingerprint"}) == []


@pytest.mark.parametrize("cls, field", [pair for pair in FIELDS if pair[0] in (BertOptions, LlamaOptions)],
                         ids=[name for name in NAMES if name.startswith(("Bert", "Llama"))])
def test_differences_name_what_changed_but_ignore_free_options(cls, field):
    changed = dataclasses.replace(cls(), **{field.name: other_value(field)})
    expected = [] if field.metadata["free"] else [f"{flag(field.name)} {other_value(field)} (was {field.default})"]
    assert differences(changed, dataclasses.asdict(cls())) == expected


def test_what_decides_the_weights_is_not_free():
    """And what only decides where, how often and in which cuts, is."""
    free = {field.name for field in dataclasses.fields(BertOptions) if field.metadata["free"]}
    assert not free & {"model", "train_data", "max_train_questions", "held_out", "batch_size", "epochs", "lr", "warmup",
                       "weight_decay", "clip", "seed", "data_seed", "max_length", "overlap", "dropout"}
    assert {"out", "resume", "save_every", "keep", "log_every", "micro_tokens", "stop_after"} <= free


def test_an_option_that_the_record_does_not_know_is_a_difference():
    recorded = dataclasses.asdict(BertOptions())
    del recorded["lr"]
    assert differences(BertOptions(), recorded) == ["--lr 3e-05 (was None)"]


# ---- who uses it ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, parts, lines", [
    (["--num-best", "3", "--shots", "2", "--prompt", "engineered"], {"bert"}, ["--prompt", "--shots"]),
    (["--num-best", "3", "--max-expansions", "9"], {"llama"}, ["--num-best", "--max-expansions"]),
    (["--num-best", "3", "--max-expansions", "9"], {"llama", "exact"}, []),
    (["--train-data", "x"], {"llama"}, ["--train-data"]),
    (["--precision", "fp32", "--na-threshold", "0"], {"predictions"}, ["--precision"])])
def test_an_option_that_nothing_uses_is_told(argv, parts, lines):
    options, typed = parse_flags(EvaluateOptions, *argv)
    found = unused_options(options, typed, parts, "this model")
    assert {line.split()[0] for line in found} == set(lines) and all("no effect on this model" in line for line in found)


@pytest.mark.parametrize("argv", [["--merge-into", "x"], ["--decode", "exact"], ["--base", "x"]])
def test_what_asks_for_something_is_an_error_where_nothing_uses_it(argv):
    options, typed = parse_flags(EvaluateOptions, *argv)
    with pytest.raises(UserError, match=f"^{argv[0]} has no effect on a BERT: it is for (llama|adapter);"):
        unused_options(options, typed, {"bert"}, "a BERT")


def test_only_what_changes_the_answers_tells_evaluations_apart():
    argv = ["--out", "x", "--micro-tokens", "5", "--overlap", "0", "--data-seed", "3", "--merge-into", "y", "--data", "z"]
    assert settings_typed(*parse_flags(EvaluateOptions, *argv)) == {"data_seed": 3, "overlap": 0}
