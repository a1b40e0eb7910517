"""A run's folder is checked first, its examples are told apart by their tokens, and a stop is not held back for ever."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from qa.errors import UserError
from qa.llama.encode import Piece, Prompt, all_tokens
from qa.options import BertOptions
from qa.training.checkpoint import write_json
from qa.training.run import StopSignal, check_folder, fingerprint


@pytest.fixture
def handlers():
    """Signals as they were before the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
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
    stop.release()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 1)
    assert not stop.requested and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_folder_is_checked_without_data_or_model(tmp_path):
    options = BertOptions(out=str(tmp_path / "run"))
    assert check_folder(options) is None
    with pytest.raises(UserError, match="holds no run"):
        check_folder(BertOptions(out=options.out, resume=True))
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "options.json", {**vars(options), "examples": "x"})
    with pytest.raises(UserError, match="already holds a run"):
        check_folder(options)
    assert check_folder(BertOptions(out=options.out, resume=True))["examples"] == "x"
    with pytest.raises(UserError, match="another run: --lr 0.5"):
        check_folder(BertOptions(out=options.out, resume=True, lr=0.5))


@pytest.mark.parametrize("name", ["model/thesis.txt", "step-000120/x", "log.jsonl"])
def test_what_a_run_would_replace_is_not_taken_for_one(name, tmp_path):
    """--model proj/model --out proj would replace the base by the product."""
    file = tmp_path / "proj" / name
    file.parent.mkdir(parents=True)
    file.write_text("not ours")
    for options in (BertOptions(out=str(tmp_path / "proj")), BertOptions(out=str(file)), BertOptions(out=str(file / "run"))):
        with pytest.raises(UserError, match="--out "):
            check_folder(options)
    assert check_folder(BertOptions(out=str(tmp_path / "proj" / "new"))) is None


def test_llama_examples_of_equal_lengths_are_told_apart():
    """One token of the passage, the question or the answer makes another fingerprint; a shared passage counts once."""
    def of(passage_id: int, question_id: int, answer_id: int) -> str:
        piece = Piece([1, passage_id], "a passage", 0)
        prompts = [Prompt(index, str(index), piece, [3, question_id], [answer_id]) for index in range(2)]
        tokens = all_tokens(prompts)
        assert tokens.dtype == np.int32 and len(tokens) == 2 + 2 * 3
        return fingerprint([], tokens)

    assert len({of(5, 6, 7), of(8, 6, 7), of(5, 8, 7), of(5, 6, 8)}) == 4 and of(5, 6, 7) == of(5, 6, 7)
