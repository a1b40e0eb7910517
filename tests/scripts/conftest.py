"""Runs of the real scripts for tests: started, signalled, waited for, and read back.

`scripts.train(folder, "--lr", "1e-3", ranks=2)` executes train_bert.py on the small data to its end; `scripts.start`
returns while it runs. The processes are forked by warm_server.py, which saves each the seconds of its imports; ranks get the
environment that torchrun would give them. `torchrun` starts the real one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
TIMEOUT = 300  # seconds for one run; only a hanging one takes them
PLACES = "Arl Bern Cork Delft Esk Fano Graz Hull Ivry Jena Kiel Lyon Mons Nola".split()
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # a process of our size gains nothing from more


@dataclass
class Ended:
    status: int
    out: str
    err: str
    out_of_others: str  # what ranks other than 0 printed

    @property
    def last_line(self) -> str:
        """The last line on stderr; a progress bar that is drawn over by "\\r" is not part of it."""
        return self.err.rstrip("\n").rpartition("\n")[2].rpartition("\r")[2].strip()


@dataclass
class Job:
    """Processes of one run, in the order of their ranks."""

    pids: list[int]
    folders: list[Path]

    def send(self, number: int, rank: int | None = None) -> None:
        """A signal to all ranks, or to one."""
        for index, (pid, folder) in enumerate(zip(self.pids, self.folders, strict=True)):
            if rank in (None, index) and not (folder / "status").exists():
                os.kill(pid, number)

    def wait(self) -> Ended:
        """How rank 0 ended, once all have."""
        deadline = time.monotonic() + TIMEOUT
        while not all((folder / "status").exists() for folder in self.folders):
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                pytest.fail(f"still running after {TIMEOUT} s: {(self.folders[0] / 'stderr').read_text()[-2000:]}")
            time.sleep(0.01)
        folder = self.folders[0]
        others = "".join((other / "stdout").read_text() for other in self.folders[1:])
        return Ended(int((folder / "status").read_text()), (folder / "stdout").read_text(), (folder / "stderr").read_text(),
                     others)


class Scripts:
    """Starts the scripts; train_bert.py on the small data and the tiny model, where the flags name no others."""

    def __init__(self, folder: Path, recipe: list[str]) -> None:
        self.folder, self.recipe, self.num_jobs = folder, recipe, 0
        self.server = subprocess.Popen([sys.executable, str(Path(__file__).with_name("warm_server.py"))], cwd=ROOT, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)})
        assert self.server.stdout.readline() == "ready\n"

    def launch(self, argv: list[str], ranks: int = 1) -> Job:
        with socket.create_server(("localhost", 0)) as probe:
            port = probe.getsockname()[1]
        pids, folders = [], []
        for rank in range(ranks):
            self.num_jobs += 1
            folders.append(self.folder / f"job-{self.num_jobs}")
            folders[-1].mkdir()
            env = {} if ranks == 1 else {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                                         "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            print(json.dumps({"argv": argv, "env": env, "folder": str(folders[-1])}), file=self.server.stdin, flush=True)
            pids.append(int(self.server.stdout.readline()))
        return Job(pids, folders)

    def finish(self, job: Job, status: int) -> Ended:
        ended = job.wait()
        assert ended.status == status, "".join((folder / "stderr").read_text()[-2000:] for folder in job.folders)
        return ended

    def start(self, out: Path, *flags: str, ranks: int = 1) -> Job:
        return self.launch(["train_bert.py", *self.recipe, "--out", str(out), *flags], ranks)

    def train(self, out: Path, *flags: str, ranks: int = 1, status: int = 0) -> Ended:
        return self.finish(self.start(out, *flags, ranks=ranks), status)

    def evaluate(self, *flags: str, ranks: int = 1, status: int = 0) -> Ended:
        return self.finish(self.launch(["evaluate.py", *flags], ranks), status)

    def torchrun(self, ranks: int, out: Path, *flags: str) -> subprocess.Popen:
        """The real launcher, in a process group of its own."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "train_bert.py",
                   *self.recipe, "--out", str(out), *flags]
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, text=True, start_new_session=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def make_document(v2: bool) -> dict:
    """7 articles, 14 passages, 41 questions, each short enough for one window; in v2.0 a third has no answer."""
    articles = []
    for number in range(14):
        place, builder, year = PLACES[number], PLACES[number - 3] + "son", str(1800 + 7 * number)
        context = (f"The bridge of {place} was built in {year}. Its builder, {builder}, died a year later."
                   + f" It was closed for repairs {number} times." * (number % 4))
        facts = [("When was the bridge built?", year), ("Who built it?", builder),
                 (f"What did {builder} build?", f"The bridge of {place}")]
        qas = [{"id": f"{number}-{index}", "question": question,
                "answers": [{"text": text, "answer_start": context.find(text)}]}
               for index, (question, text) in enumerate(facts[:2 if number == 13 else 3])]
        if v2:
            qas = [qa | {"is_impossible": False} for qa in qas]
            qas[0] = {"id": f"{number}-none", "question": "When was the tower built?", "answers": [], "is_impossible": True}
        if number % 2 == 0:
            articles.append({"title": place, "paragraphs": []})
        articles[-1]["paragraphs"].append({"context": context, "qas": qas})
    return {"version": "v2.0" if v2 else "1.1", "data": articles}


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "small.json"
    path.write_text(json.dumps(make_document(v2=False)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data_v2_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "small-v2.json"
    path.write_text(json.dumps(make_document(v2=True)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def scripts(data_file, tiny_bert_folder, tmp_path_factory):
    """41 windows in batches of 13: 4 steps an epoch, one of them of 2 windows; 5 epochs, 20 steps."""
    recipe = ["--model", str(tiny_bert_folder), "--train-data", str(data_file), "--max-length", "128", "--overlap", "32",
              "--batch-size", "13", "--epochs", "5", "--lr", "1e-3", "--log-every", "1", "--precision", "fp32"]
    scripts = Scripts(tmp_path_factory.mktemp("jobs"), recipe)
    yield scripts
    scripts.server.stdin.close()
    scripts.server.wait()


class Run:
    """What a run left in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def events(self, event: str) -> list[dict]:
        lines = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        return [line for line in lines if line["event"] == event]

    def losses(self) -> dict[int, float]:
        """Of each step, the last time that it was made."""
        return {line["step"]: line["loss"] for line in self.events("step")}

    def steps(self) -> list[int]:
        """The steps that have a checkpoint."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def last(self) -> Path:
        """The folder of the newest checkpoint."""
        return self.folder / (self.folder / "last").read_text().split()[0]

    def tensors(self, step: int | None = None) -> dict[str, Tensor]:
        """Weights and optimizer of a checkpoint."""
        folder = self.last() if step is None else self.folder / f"step-{step:06d}"
        return {f"{stem}:{name}": tensor for stem in ("model", "optimizer")
                for name, tensor in load_file(folder / f"{stem}.safetensors").items()}

    def state(self) -> dict:
        return json.loads((self.last() / "state.json").read_text())

    def product(self) -> dict[str, Tensor]:
        return load_file(self.folder / "model" / "model.safetensors")


@pytest.fixture(scope="session")
def read_run():
    return Run
