"""What a run says while it runs: a line of log.jsonl is a stretch of steps, none is lost, and the clock can be stopped."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest
import torch

from qa.training import log as log_module
from qa.training.distributed import Runtime
from qa.training.log import RunLog

MAIN, OTHER = (Runtime(rank, 2, torch.device("cpu")) for rank in (0, 1))


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """One number, the seconds that the log's clock shows."""
    seconds = [100.0]
    monkeypatch.setattr(log_module.time, "perf_counter", lambda: seconds[0])
    return seconds


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.jsonl"


def lines(path) -> list[dict]:
    """Without the time of day."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(line.pop("time") for line in found)
    return found


def test_a_stretch_of_three_steps_becomes_one_line_of_means(path, clock):
    log = RunLog(path, 3, "windows", MAIN)
    clock[0] += 4
    log.step(1, 6.0, 8, 8, 3, grad_norm=1.0, padding=0.1, lr=1e-4, skipped=0)
    log.step(2, 3.0, 8, 8, 3, grad_norm=5.0, padding=0.2, lr=2e-4, skipped=1)
    log.step(3, 1.0, 4, 4, 3, grad_norm=3.0, padding=0.6, lr=3e-4, skipped=1)
    log.close()
    (line,) = lines(path)
    assert line == {
        "event": "step", "step": 3,
        "loss": pytest.approx((6 * 8 + 3 * 8 + 1 * 4) / 20),  # by windows
        "windows_per_second": 20 / 4,
        "grad_norm": pytest.approx(3), "grad_norm_max": 5,  # of steps
        "padding": pytest.approx(0.3),
        "lr": 3e-4, "skipped": 1}  # as they are now


@pytest.mark.parametrize("norms, mean, largest", [
    ([2.0, math.inf, 4.0, math.nan], 3, 4), ([math.inf], None, None), ([math.nan, 7.0], 7, 7)])
def test_gradient_norms_of_skipped_steps_do_not_count(norms, mean, largest, path):
    log = RunLog(path, 100, "questions", MAIN)
    for step, norm in enumerate(norms, start=1):
        log.step(step, 1.0, 1, 1, 50, grad_norm=norm, lr=1e-4)
    log.close()
    (line,) = lines(path)
    assert (line["grad_norm"], line["grad_norm_max"]) == (mean, largest) and "padding" not in line


@pytest.mark.parametrize("done, made, total, every, expected", [
    (0, 12, 12, 5, [5, 10, 12]), (0, 7, 12, 5, [5, 7]), (0, 10, 12, 5, [5, 10]), (0, 0, 12, 5, []), (8, 12, 12, 5, [10, 12]),
    (0, 3, 12, 100, [3])])
def test_every_step_is_in_one_line_also_those_before_a_stop(done, made, total, every, expected, path):
    log = RunLog(path, total, "windows", MAIN)
    for step in range(done + 1, made + 1):
        log.step(step, float(step), 1, 1, every, grad_norm=1.0, lr=1e-4)
    log.close()
    assert [line["step"] for line in lines(path)] == expected
    for line, before in zip(lines(path), [done, *expected], strict=False):
        steps = range(before + 1, line["step"] + 1)
        assert line["loss"] == pytest.approx(sum(steps) / len(steps))


def test_the_speed_leaves_out_what_is_done_while_the_clock_is_stopped(path, clock):
    log = RunLog(path, 3, "windows", MAIN)
    with log.clock_stopped():  # before the first step
        clock[0] += 1000
    for step in (1, 2, 3):
        clock[0] += 2
        log.step(step, 1.0, 8, 8, 2, grad_norm=1.0, lr=1e-4)
        with log.clock_stopped():  # within a stretch after step 1, between two after step 2
            clock[0] += 1000
    with pytest.raises(KeyboardInterrupt), log.clock_stopped():
        clock[0] += 1000
        raise KeyboardInterrupt
    log.close()
    assert [line["windows_per_second"] for line in lines(path)] == [16 / 4, 8 / 2]


@pytest.mark.parametrize("before, kept", [
    ("", []), ('{"event": "a"}\n', ['{"event": "a"}']), ('{"event": "a"}\n{"event": "st', ['{"event": "a"}', '{"event": "st'])])
def test_a_line_that_a_crash_cut_does_not_swallow_the_next(before, kept, path):
    path.write_text(before, encoding="utf-8")
    log = RunLog(path, 3, "windows", MAIN)
    log.write("evaluation", f1=80.5, when="nach Größe", loss=math.inf)
    log.close()
    *old, new = path.read_text(encoding="utf-8").splitlines()
    assert old == kept
    assert json.loads(new) | {"time": ""} == {"event": "evaluation", "time": "", "f1": 80.5, "when": "nach Größe", "loss": None}


def test_without_a_terminal_each_line_of_the_log_is_a_line_of_text(path, clock, capsys):
    log = RunLog(path, 3, "windows", MAIN)
    log.say("before")
    for step in (1, 2, 3):
        clock[0] += 2
        log.step(step, step / 2, 8, 8, 2, grad_norm=1.0, lr=2e-5)
    log.say("after")
    log.close()
    said = capsys.readouterr()
    assert said.out == "before\nafter\n"
    assert said.err == ("step 2 of 3: loss 0.7500, lr 2.00e-05, 4.0 windows/s\n"
                        "step 3 of 3: loss 1.5000, lr 2.00e-05, 4.0 windows/s\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_opens_at_the_first_step(path, monkeypatch):
    """And not before, so that what is said until then has the terminal to itself. A resumed run's bar begins at its step."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    log = RunLog(path, 30, "windows", MAIN)
    log.say("300 questions")
    assert terminal.getvalue() == ""
    log.step(11, 0.5, 8, 8, 1, grad_norm=1.0, lr=2e-5)
    log.close()
    bar = terminal.getvalue().split("\r")[-1]
    assert "11/30" in bar and "loss 0.5000, lr 2.00e-05" in bar and "step 11 of" not in terminal.getvalue()


def test_other_ranks_are_silent_and_write_nothing(path, capsys):
    log = RunLog(path, 3, "windows", OTHER)
    log.say("before")
    log.step(1, 1.0, 8, 8, 1, grad_norm=1.0, lr=1e-4)
    log.write("evaluation", f1=1.0)
    with log.clock_stopped():
        pass
    log.close()
    assert not path.exists() and capsys.readouterr() == ("", "")
