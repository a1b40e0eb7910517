"""A run that was stopped, killed or damaged goes on as if nothing had happened. Through train_bert.py."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time

import pytest
import torch

SAVE_ALL = ("--save-every", "1", "--keep", "30")
LONG = ("--epochs", "25")  # 100 steps, so that a signal arrives before the end


@pytest.fixture
def whole(scripts):
    """whole(ranks, *flags): a run that nothing interrupts, 20 steps if no flag says more, with the dropout of the config."""
    return scripts.whole


# ---- stopped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_run_equals_uninterrupted_run(ranks, whole, scripts, read_run, tmp_path):
    """20 steps against 10 and 10; an epoch has 4."""
    ended = scripts.train(tmp_path / "run", "--stop-after", "10", ranks=ranks)
    assert ended.last_line == "stopped after step 10 of 20; go on with the same command and --resume"
    scripts.train(tmp_path / "run", "--resume", ranks=ranks)
    read_run(tmp_path / "run").assert_equal_to_the_bit(whole(ranks))


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_auto_starts_goes_on_and_leaves_a_finished_run(ranks, whole, scripts, read_run, tmp_path):
    """The same command each time, as in a cluster's job array."""
    for words in ("the run is in", "resumed from step 12", "already finished"):
        ended = scripts.train(tmp_path / "run", "--resume", "auto", "--stop-after", "12", ranks=ranks)
        assert words in ended.out and ended.err.count("stopped after step 12 of 20") == (words == "the run is in")
    read_run(tmp_path / "run").assert_equal_to_the_bit(whole(ranks))


def test_max_steps_of_five_epochs_are_five_epochs(whole, scripts, read_run, tmp_path):
    scripts.without("--epochs").train(tmp_path / "run", "--max-steps", "20")
    read_run(tmp_path / "run").assert_equal_to_the_bit(whole(1))


def test_max_steps_end_and_resume_within_an_epoch(scripts, read_run, tmp_path):
    """Ten steps of 3 an epoch; the schedule ends with them, and so does the choice on held-out articles."""
    run, other = read_run(tmp_path / "run"), read_run(tmp_path / "other")
    flags = ["--max-steps", "10", "--held-out", "0.2"]
    scripts.without("--epochs").train(run.folder, *flags)
    rates = [1e-3 * min(step, (11 - step) / 9) for step in range(1, 11)]  # one of ten steps rises
    assert [line["lr"] for line in run.events("step")] == pytest.approx(rates)
    assert [line["step"] for line in run.events("evaluation")] == [3, 6, 9, 10] and run.steps() == [9, 10]
    assert "10 steps, batch 13" in (run.folder / "model" / "README.md").read_text()
    scripts.without("--epochs").train(other.folder, *flags, "--stop-after", "8")
    scripts.without("--epochs").train(other.folder, *flags, "--resume")
    other.assert_equal_to_the_bit(run)


def test_dropout_differs_from_rank_to_rank(whole):
    """Else dropout would be off, and the test above would show little."""
    assert abs(whole(1).losses()[1] - whole(2).losses()[1]) > 1e-4


def test_resumed_on_other_ranks_every_step_has_the_same_examples(whole, scripts, read_run, tmp_path):
    """Without dropout, in double precision, equal losses and weights leave no room for other examples."""
    exact = ("--precision", "fp64", "--dropout", "0")
    scripts.train(tmp_path / "run", *exact, "--stop-after", "7")
    scripts.train(tmp_path / "run", *exact, "--stop-after", "6", "--resume", ranks=3)
    scripts.train(tmp_path / "run", *exact, "--resume", ranks=2)
    run, reference = read_run(tmp_path / "run"), whole(1, *exact)
    assert run.losses() == pytest.approx(reference.losses(), abs=1e-9, rel=0)
    for name, tensor in reference.tensors().items():
        torch.testing.assert_close(run.tensors()[name], tensor, atol=1e-9, rtol=0)


def test_resuming_a_finished_run_leaves_it_as_it_is(whole, scripts, read_run, tmp_path):
    shutil.copytree(whole(1).folder, tmp_path / "run")
    scripts.train(tmp_path / "run", "--resume")
    read_run(tmp_path / "run").assert_equal_to_the_bit(whole(1))


# ---- signals --------------------------------------------------------------------------------------------------


def assert_stopped_early(text: str, run) -> None:
    stopped = re.search(r"^stopped after step (\d+) of 100; go on with the same command and --resume$", text, re.MULTILINE)
    assert stopped, text[-3000:]
    assert int(stopped[1]) == run.steps()[-1] == max(run.losses()) < 100


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_leaves_a_checkpoint_that_resumes(number, whole, scripts, read_run, tmp_path):
    job = scripts.start(tmp_path / "run", *LONG)
    read_run(tmp_path / "run").wait_for_step(3)
    job.send(number)
    ended = job.wait()
    run = read_run(tmp_path / "run")
    assert ended.status == 1 and "Traceback" not in ended.err
    assert_stopped_early(ended.last_line, run)
    scripts.train(tmp_path / "run", *LONG, "--resume")
    run.assert_equal_to_the_bit(whole(1, *LONG))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_torchrun_stops_all_ranks(number, whole, scripts, read_run, tmp_path):
    process = scripts.torchrun(2, tmp_path / "run", *LONG)
    read_run(tmp_path / "run").wait_for_step(3)
    process.send_signal(number)
    output = process.communicate(timeout=300)[0]
    run = read_run(tmp_path / "run")
    assert process.returncode != 0 and output.count("go on with the same command") == 1
    assert_stopped_early(output.replace("\r", "\n"), run)
    scripts.train(tmp_path / "run", *LONG, "--resume", ranks=2)
    run.assert_equal_to_the_bit(whole(2, *LONG))


def test_signal_to_one_rank_stops_all(scripts, read_run, tmp_path):
    job = scripts.start(tmp_path / "run", *LONG, ranks=3)
    read_run(tmp_path / "run").wait_for_step(3)
    job.send(signal.SIGTERM, rank=2)
    assert_stopped_early(job.wait().last_line, read_run(tmp_path / "run"))
    assert {(folder / "status").read_text() for folder in job.folders} == {"1"}
    assert [(folder / "stderr").read_text() for folder in job.folders[1:]] == ["", ""]  # rank 0 speaks for all


# ---- kills and damage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 20))])
def test_killed_at_any_instant_resumes_to_the_same_end(seed, whole, scripts, read_run, tmp_path):
    """A run that saves every step: SIGKILL falls on a save more often than not."""
    generator = random.Random(seed)
    job = scripts.start(tmp_path / "run", *SAVE_ALL)
    read_run(tmp_path / "run").wait_for_step(generator.randint(1, 20))
    time.sleep(generator.uniform(0, 0.2))
    job.send(signal.SIGKILL)
    assert job.wait().status in (0, -signal.SIGKILL)  # 0: it had just ended
    ended = scripts.train(tmp_path / "run", *SAVE_ALL, "--resume")
    assert "warning" not in ended.err
    read_run(tmp_path / "run").assert_equal_to_the_bit(whole(1))


# Decides the scores of the held-out articles: of the 5 evaluations, at steps 2, 4, ... 10, the second is the best.
BEST_AT_4 = """
import qa.training.evaluator as evaluator
report = evaluator.Evaluator._report
evaluator.Evaluator._report = lambda self, *args: report(self, *args) | {"f1": 90.0 - abs(self.state.step - 4)}
"""
HELD_OUT = ("--held-out", "0.3", "--seed", "3")  # a seed of its own: nobody else's run may be taken for this one


@pytest.fixture
def best_at_4(scripts):
    scripts.before = BEST_AT_4
    yield scripts
    scripts.before = ""


def test_killed_while_a_better_product_takes_the_place_of_the_old_one(best_at_4, read_run, tmp_path):
    """Between two renames the product has no name; the run still ends with the best on held-out articles."""
    reference = best_at_4.whole(1, *HELD_OUT)
    best_at_4.train(tmp_path / "run", *HELD_OUT, "--stop-after", "6")
    (tmp_path / "run" / "model").rename(tmp_path / "run" / ".model.old")
    best_at_4.train(tmp_path / "run", *HELD_OUT, "--resume")
    read_run(tmp_path / "run").assert_equal_to_the_bit(reference)
    assert json.loads((reference.folder / "model" / "qa.json").read_text())["step"] == 4
    assert not list((tmp_path / "run").glob(".model*"))


def test_a_stop_at_an_epochs_end_leaves_the_evaluation_to_the_resume(best_at_4, read_run, tmp_path):
    """The checkpoint comes first, so that no evaluation, however long, can cost it."""
    best_at_4.train(tmp_path / "run", *HELD_OUT, "--stop-after", "4")
    assert [line["step"] for line in read_run(tmp_path / "run").events("evaluation")] == [2]
    best_at_4.train(tmp_path / "run", *HELD_OUT, "--resume")
    read_run(tmp_path / "run").assert_equal_to_the_bit(best_at_4.whole(1, *HELD_OUT))
    assert [line["step"] for line in read_run(tmp_path / "run").events("evaluation")] == [2, 4, 6, 8, 10]


def damage_weights(model) -> None:
    flip_a_bit(model / "model.safetensors")


def another_runs_product(model) -> None:
    """Whole in itself, of the same step."""
    shutil.rmtree(model)
    shutil.copytree(model.parents[1] / "other" / "model", model)


@pytest.mark.parametrize("damage, words", [(damage_weights, "damaged"), (shutil.rmtree, "damaged"),
                                           (another_runs_product, "another run's")])
def test_a_resume_needs_the_best_product_whole(damage, words, best_at_4, tmp_path):
    """Asked at once, not hours later."""
    best_at_4.train(tmp_path / "other", *HELD_OUT, "--lr", "2e-3", "--stop-after", "6")
    best_at_4.train(tmp_path / "run", *HELD_OUT, "--stop-after", "6")
    damage(tmp_path / "run" / "model")
    ended = best_at_4.train(tmp_path / "run", *HELD_OUT, "--resume", status=2)
    assert words in ended.last_line and str(tmp_path / "run" / "model") in ended.last_line


@pytest.fixture(scope="module")
def stopped_folder(scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "run"
    scripts.train(folder, *SAVE_ALL, "--stop-after", "10")
    return folder


def flip_a_bit(path) -> None:
    content, generator = bytearray(path.read_bytes()), random.Random(path.name)
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_flipped_bit_is_noticed_and_the_checkpoint_before_taken(name, stopped_folder, whole, scripts, read_run, tmp_path):
    shutil.copytree(stopped_folder, tmp_path / "run")
    flip_a_bit(tmp_path / "run" / "step-000010" / name)
    ended = scripts.train(tmp_path / "run", *SAVE_ALL, "--resume")
    assert f"step-000010/{name}" in ended.err and "going on from step-000009" in ended.err
    read_run(tmp_path / "run").assert_equal_to_the_bit(whole(1))


def test_flipped_bit_in_the_file_named_last_is_noticed(stopped_folder, whole, scripts, read_run, tmp_path):
    shutil.copytree(stopped_folder, tmp_path / "run")
    flip_a_bit(tmp_path / "run" / "last")
    ended = scripts.train(tmp_path / "run", *SAVE_ALL, "--resume")
    assert f"{tmp_path / 'run' / 'last'}: " in ended.err and "going on from step-000010" in ended.err
    read_run(tmp_path / "run").assert_equal_to_the_bit(whole(1))


def test_without_a_whole_checkpoint_the_resume_is_refused(stopped_folder, scripts, tmp_path):
    shutil.copytree(stopped_folder, tmp_path / "run")
    for step in range(1, 11):
        flip_a_bit(tmp_path / "run" / f"step-{step:06d}" / "state.json")
    ended = scripts.train(tmp_path / "run", *SAVE_ALL, "--resume", status=2)
    assert ended.err.count("\n") == 1 and ended.err.startswith("error: ") and "none that is whole" in ended.err
