"""A run of train_llama.py that was stopped or killed goes on as if nothing had happened.

What has nothing to do with the model (damaged files, torchrun, Ctrl-C) is tested by test_resume.py, through train_bert.py.
"""

from __future__ import annotations

import random
import re
import signal
import time

import pytest
import torch

DROPOUT = ("--lora-dropout", "0.1")
LONG = (*DROPOUT, "--epochs", "12")  # 48 steps, so that a signal arrives before the end
SAVE_ALL = (*DROPOUT, "--save-every", "1", "--keep", "30")


@pytest.fixture
def whole(llama_scripts):
    """whole(ranks, *flags): a run that nothing interrupts, 20 steps if no flag says more."""
    return llama_scripts.whole


@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_run_equals_uninterrupted_run(ranks, whole, llama_scripts, read_run, tmp_path):
    """20 steps against 10 and 10; an epoch has 4."""
    ended = llama_scripts.train(tmp_path / "run", *DROPOUT, "--stop-after", "10", ranks=ranks)
    assert ended.last_line == "stopped after step 10 of 20; go on with the same command and --resume"
    llama_scripts.train(tmp_path / "run", *DROPOUT, "--resume", ranks=ranks)
    read_run(tmp_path / "run").assert_equal_to_the_bit(whole(ranks, *DROPOUT))


def test_max_steps_of_five_epochs_are_five_epochs_and_resume_auto_goes_on(whole, llama_scripts, read_run, tmp_path):
    """The first process stops within an epoch."""
    for _ in range(2):
        llama_scripts.without("--epochs").train(tmp_path / "run", *DROPOUT, "--max-steps", "20", "--resume", "auto",
                                                "--stop-after", "14")
    read_run(tmp_path / "run").assert_equal_to_the_bit(whole(1, *DROPOUT))


def test_dropout_differs_from_rank_to_rank(whole):
    """Else dropout would be off, and the test above would show little. In the first step B is zero, so dropout is unseen."""
    one, two = whole(1, *DROPOUT).losses(), whole(2, *DROPOUT).losses()
    assert abs(one[1] - two[1]) < 1e-5 and abs(one[8] - two[8]) > 1e-4


def test_resumed_on_other_ranks_every_step_has_the_same_questions(whole, llama_scripts, read_run, tmp_path):
    """Without dropout, in double precision, equal losses and weights leave no room for other questions."""
    exact = ("--precision", "fp64")
    llama_scripts.train(tmp_path / "run", *exact, "--stop-after", "7")
    llama_scripts.train(tmp_path / "run", *exact, "--stop-after", "6", "--resume", ranks=3)
    llama_scripts.train(tmp_path / "run", *exact, "--resume", ranks=2)
    run, reference = read_run(tmp_path / "run"), whole(1, *exact)
    assert run.losses() == pytest.approx(reference.losses(), abs=1e-9, rel=0) and len(run.losses()) == 20
    for name, tensor in reference.tensors().items():
        torch.testing.assert_close(run.tensors()[name], tensor, atol=1e-9, rtol=0)


def test_sigterm_leaves_a_checkpoint_that_resumes(whole, llama_scripts, read_run, tmp_path):
    job, run = llama_scripts.start(tmp_path / "run", *LONG), read_run(tmp_path / "run")
    run.wait_for_step(3)
    job.send(signal.SIGTERM)
    ended = job.wait()
    stopped = re.fullmatch(r"stopped after step (\d+) of 48; go on with the same command and --resume", ended.last_line)
    assert ended.status == 1 and "Traceback" not in ended.err and stopped, ended.err[-3000:]
    assert int(stopped[1]) == run.steps()[-1] == max(run.losses()) < 48
    llama_scripts.train(tmp_path / "run", *LONG, "--resume")
    run.assert_equal_to_the_bit(whole(1, *LONG))


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 20))])
def test_killed_at_any_instant_resumes_to_the_same_end(seed, whole, llama_scripts, read_run, tmp_path):
    """A run that saves every step: SIGKILL falls on a save more often than not."""
    generator = random.Random(seed)
    job = llama_scripts.start(tmp_path / "run", *SAVE_ALL)
    read_run(tmp_path / "run").wait_for_step(generator.randint(1, 20))
    time.sleep(generator.uniform(0, 0.2))
    job.send(signal.SIGKILL)
    assert job.wait().status in (0, -signal.SIGKILL)  # 0: it had just ended
    ended = llama_scripts.train(tmp_path / "run", *SAVE_ALL, "--resume")
    assert "warning" not in ended.err
    read_run(tmp_path / "run").assert_equal_to_the_bit(whole(1, *DROPOUT))
