"""Every numeric flag of the three scripts with values that it may not have, and with the largest and smallest that it may.

One worked case: `train_bert.py --clip inf` ends with status 2 and one line that begins with "error: --clip inf: ".
"""

from __future__ import annotations

import dataclasses
import sys
import typing

import pytest

import evaluate
import train_bert
import train_llama
from qa.errors import UserError, exit_status
from qa.flags import parse
from qa.options import BertOptions, EvaluateOptions, LlamaOptions, flag

SCRIPTS = {BertOptions: train_bert, LlamaOptions: train_llama, EvaluateOptions: evaluate}
NUMBERS = [(cls, field.name) for cls in SCRIPTS for field in dataclasses.fields(cls)
           if typing.get_type_hints(cls)[field.name] in (int, float, int | None, float | None)]
VALUES = ("0", "-1", "nan", "inf", "-inf", "1e99", "1" + 99 * "0", "text", "", "-", "--", "9" * 5000)
AT_ZERO = set("held_out data_seed save_every eval_every stop_after warmup weight_decay clip seed dropout micro_tokens shots "
              "overlap max_train_questions lora_dropout max_questions na_threshold max_expansions cache_mb".split())  # may be 0


@pytest.mark.parametrize(("cls", "name"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_numbers_that_a_flag_may_not_have(cls, name):
    for value in VALUES:
        allowed = value == "0" and name in AT_ZERO or value == "-1" and name == "na_threshold"
        try:
            options, _ = parse(cls, "", argv=[f"{flag(name)}={value}"])
            assert allowed and getattr(options, name) == float(value)
        except UserError as error:
            assert not allowed and "\n" not in str(error) and "--" in str(error), value


def test_worked_case(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_bert.py", "--clip", "inf"])
    assert exit_status(train_bert.main) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: --clip inf: ") and line.count("\n") == 1


@pytest.fixture
def status_of(monkeypatch, capsys, tiny_bert_folder, tiny_llama_folder, data_file, tmp_path):
    """status_of(cls, *flags): of the script, run in this process; not 0 has one line on stderr, and no traceback."""
    common = ["--precision", "fp32", "--out", str(tmp_path / "out")]
    recipe = ["--train-data", str(data_file), "--epochs", "1", "--max-train-questions", "4", "--log-every", "9", *common]
    lines = {BertOptions: ["--model", str(tiny_bert_folder), "--max-length", "128", "--overlap", "32", *recipe],
             LlamaOptions: ["--model", str(tiny_llama_folder), *recipe],
             EvaluateOptions: ["--ckpt", str(tiny_bert_folder), "--data", str(data_file), "--max-length", "128",
                               "--overlap", "32", "--max-questions", "4", *common]}

    def run(cls, *flags: str) -> int:
        monkeypatch.setattr(sys, "argv", [SCRIPTS[cls].__name__, *lines[cls], *flags])
        capsys.readouterr()
        status = exit_status(SCRIPTS[cls].main)
        err = capsys.readouterr().err
        assert "Traceback" not in err
        assert status == 0 or sum(line.startswith(("error: ", "stopped ")) for line in err.splitlines()) == 1, err
        return status

    return run


@pytest.mark.parametrize("cls", SCRIPTS, ids=lambda cls: cls.__name__)
def test_zero_where_it_is_allowed(cls, status_of):
    """All at once."""
    assert status_of(cls, *(f"{flag(name)}=0" for of, name in NUMBERS if of is cls and name in AT_ZERO)) == 0


@pytest.mark.parametrize("cls", SCRIPTS, ids=lambda cls: cls.__name__)
def test_the_largest_number(cls, status_of):
    """All at once; but two would take for ever, and what the model or the data bound is refused, one by one."""
    bounded = {"max_length", "rank", "shots", "held_out", "warmup", "dropout", "lora_dropout", "lr", "alpha", "weight_decay"}
    bounded |= {"overlap"} if cls is not LlamaOptions else set()
    flags = {name: f"{flag(name)}={2**31 - 1 if kind in (int, int | None) else 9e37}" for of, name in NUMBERS if of is cls
             for kind in [typing.get_type_hints(cls)[name]]}
    free = flags.keys() - bounded - {"epochs", "max_steps", "max_train_questions"}
    assert status_of(cls, *(flags[name] for name in sorted(free))) == 0
    for name in bounded & flags.keys() - {"lr", "alpha", "weight_decay"}:
        assert status_of(cls, flags[name]) == 2, name


@pytest.mark.parametrize(("cls", "name"), [(BertOptions, "lr"), (LlamaOptions, "alpha"), (BertOptions, "weight_decay")],
                         ids=lambda value: getattr(value, "__name__", value))
def test_a_recipe_of_absurd_numbers_stops_before_it_spoils_the_weights(cls, name, status_of):
    assert status_of(cls, flag(name), "9e37", "--epochs", "3", "--batch-size", "2") == 1
