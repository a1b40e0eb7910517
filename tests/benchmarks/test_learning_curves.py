"""The study of learning curves: a study that is killed and started again does no run twice, and ends with the same results.

One worked case. 250 questions, 10 epochs or 200 updates of 8 questions, whichever is more: 313 updates, because 10 * 250 / 8 is
more than 200.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/studies/learning_curves.py"
CODE = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("study", {str(SCRIPT)!r})
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)
"""


class Killed(BaseException):
    pass


def load_study():
    spec = importlib.util.spec_from_file_location("study", SCRIPT)
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    return study


@pytest.fixture
def squad_folder(tmp_path, small_squad) -> Path:
    folder = tmp_path / "squad"
    folder.mkdir()
    for name in ("train", "dev"):
        (folder / f"{name}-v1.1.json").write_text(json.dumps(small_squad), encoding="utf-8")
    return folder


class FakeScripts:
    """What the scripts leave, made in no time; an F1 that depends on the command alone. Dies as often as it is told to."""

    def __init__(self, deaths: int) -> None:
        self.deaths, self.draw, self.finished = deaths, random.Random(0), []

    def run(self, command: list[str], cwd: Path, pass_fds: list[int]) -> SimpleNamespace:
        values = dict(word.split("=", 1) for word in command if "=" in word)
        out, is_training = Path(values["--out"]), command[1].startswith("train")
        out.mkdir(parents=True, exist_ok=True)
        if self.deaths and self.draw.random() < 0.4:
            self.deaths -= 1
            raise Killed
        if is_training and (out / "finished.json").exists():  # --resume auto leaves a finished training alone
            return SimpleNamespace(returncode=0)
        if is_training:
            (out / "finished.json").write_text('{"seconds": 60.0}')
        else:
            f1 = random.Random(f"{out.parent.name}/{out.name}").random()
            (out / "metrics.json").write_text(json.dumps({"f1": f1}))
            if self.deaths and self.draw.random() < 0.2:
                self.deaths -= 1
                raise Killed
            (out / "environment.json").write_text('{"seconds": 6.0}')
        self.finished.append(out)
        return SimpleNamespace(returncode=0)


def run_study(monkeypatch, squad_folder: Path, out: Path, deaths: int) -> FakeScripts:
    fake, study = FakeScripts(deaths), load_study()
    monkeypatch.setattr(sys, "argv", ["study", "--data-dir", str(squad_folder), "--out", str(out)])
    monkeypatch.setattr(subprocess, "run", fake.run)
    while True:
        try:
            study.main()
            return fake
        except Killed:
            continue


def test_killed_study_ends_with_the_same_results_and_does_no_run_twice(monkeypatch, tmp_path, squad_folder, capsys):
    whole = run_study(monkeypatch, squad_folder, tmp_path / "whole", deaths=0)
    killed = run_study(monkeypatch, squad_folder, tmp_path / "killed", deaths=8)
    assert killed.deaths == 0 and len(killed.finished) == len(set(killed.finished)) == len(whole.finished)
    results = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.json")}
               for folder in (tmp_path / "whole", tmp_path / "killed")]
    assert results[0] == results[1]
    names = [path.parent.name for path in (tmp_path / "whole/runs").glob("*/evaluation")]
    assert len(names) == 13 and len({name.split("-lr")[0] for name in names}) == 5  # 5 sizes, three seeds of four of them


def test_best_candidate_on_held_out_articles_makes_the_grid(monkeypatch, tmp_path, squad_folder):
    run_study(monkeypatch, squad_folder, tmp_path / "out", deaths=0)
    for family in ("bert", "lora"):
        tried = {path.parent.parent.name: json.loads(path.read_text())["f1"]
                 for path in (tmp_path / "out/runs").glob(f"{family}*/held-out/metrics.json")}
        rate = max(tried, key=tried.get).split("-")[2]
        assert len(tried) == 2
        assert {path.parent.name.split("-")[2] for path in (tmp_path / "out/runs").glob(f"{family}*/evaluation")} == {rate}
    articles = {name: {article["title"] for article in json.loads((tmp_path / f"out/data/{name}.json").read_text())["data"]}
                for name in ("train", "held-out")}
    assert articles["train"] and articles["held-out"] and not articles["train"] & articles["held-out"]


def test_list_has_a_command_for_each_candidate_and_then_for_each_run(monkeypatch, tmp_path, squad_folder, capsys):
    study, out = load_study(), tmp_path / "a folder"
    monkeypatch.setattr(sys, "argv", ["study", "--data-dir", str(squad_folder), "--out", str(out), "--list"])
    fcntl.flock(lock := open(tmp_path / "lock", "w"), fcntl.LOCK_EX)  # of the study, that runs: a list does not wait for it
    out.mkdir()
    (out / "lock").symlink_to(lock.name)
    study.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("--max-steps" in line and " && python evaluate.py " in line for line in lines)
    assert f"--train-data={out}/data/train.json" in shlex.split(lines[0]) and "--max-steps 313 " in lines[0]  # the worked case
    for folder in (Path(shlex.split(line)[-1].removeprefix("--out=")) for line in lines):
        folder.mkdir(parents=True)
        for path, value in (("metrics.json", {"f1": 1.0}), ("environment.json", {"seconds": 1.0})):
            (folder / path).write_text(json.dumps(value))
    study.main()
    assert len(capsys.readouterr().out.splitlines()) == 13


def test_data_that_is_not_there_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["study", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        load_study().main()
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: --data-dir {tmp_path}: lacks train-v1.1.json")


@pytest.mark.slow
def test_study_killed_at_random_instants_gives_the_same_bits(tmp_path, squad_folder, tiny_bert_folder):
    """The real scripts, with a tiny model. The driver and what it started are killed together, by signal 9."""
    code = CODE + f"""
study.SIZES, study.CANDIDATES = {{"bert": {{8: 2, 20: 1}}}}, {{"bert": [(1e-3, 2, 30), (2e-3, 2, 30)]}}
study.SCRIPTS = {{"bert": "train_bert.py --max-length 128 --overlap 32 --model {tiny_bert_folder}"}}
study.TRIED_ON = 8
study.main()
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start(out: Path) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", code, "--data-dir", str(squad_folder), "--out", str(out)],
                                env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    begin = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    whole, draw = time.monotonic() - begin, random.Random(0)
    for _ in range(5):
        process = start(tmp_path / "killed")
        time.sleep(draw.uniform(0.1, 0.5) * whole)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "killed").wait() == 0
    folders = [tmp_path / "whole/runs", tmp_path / "killed/runs"]
    for pattern in ("*/*/per_question.json", "*/*/metrics.json", "*/model/model.safetensors", "*/train_questions.json"):
        whole, killed = ({path.relative_to(folder): path.read_bytes() for path in folder.glob(pattern)} for folder in folders)
        assert whole and whole == killed
    for run in folders[0].iterdir():  # a step after the last checkpoint is done again, to the same loss
        logs = [(folder / run.name / "log.jsonl").read_text().splitlines() for folder in folders]
        whole, killed = ({event["step"]: event["loss"] for event in map(json.loads, log) if event["event"] == "step"}
                         for log in logs)
        assert whole == killed
