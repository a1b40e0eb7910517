"""Runs of the real scripts for tests: started, signalled, waited for, and read back.

`scripts.train(folder, "--lr", "1e-3", ranks=2)` executes train_bert.py on the small data to its end, `llama_scripts.train`
train_llama.py; `start` returns while it runs. The processes are forked by warm_server.py, which saves each the seconds of its
imports; ranks get the environment that torchrun would give them. `torchrun` starts the real one.
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
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
TIMEOUT = 300  # seconds for one run; only a hanging one takes them
PLACES = "Arl Bern Cork Delft Esk Fano Graz Hull Ivry Jena Kiel Lyon Mons Nola".split()
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",  # a process of our size gains nothing from more
               "HF_HUB_OFFLINE": "1"}


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


class WarmServer:
    """The process that forks a process for every run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.num_jobs = folder, 0
        self.server = subprocess.Popen([sys.executable, str(Path(__file__).with_name("warm_server.py"))], cwd=ROOT, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)})
        assert self.server.stdout.readline() == "ready\n"

    def launch(self, argv: list[str], ranks: int = 1, before: str = "") -> Job:
        with socket.create_server(("localhost", 0)) as probe:
            port = probe.getsockname()[1]
        pids, folders = [], []
        for rank in range(ranks):
            self.num_jobs += 1
            folders.append(self.folder / f"job-{self.num_jobs}")
            folders[-1].mkdir()
            env = {} if ranks == 1 else {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                                         "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            print(json.dumps({"argv": argv, "env": env, "folder": str(folders[-1]),
                              "before": before}), file=self.server.stdin, flush=True)
            pids.append(int(self.server.stdout.readline()))
        return Job(pids, folders)

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()


class Scripts:
    """Starts evaluate.py and one of the train scripts: on the small data and a tiny model, where the flags name no others."""

    def __init__(self, server: WarmServer, script: str, recipe: list[str]) -> None:
        self.server, self.script, self.recipe = server, script, recipe
        self.before = ""  # code that every run executes first
        self.runs: dict[tuple, Run] = {}

    def without(self, flag: str) -> Scripts:
        """The same script without a flag of the recipe."""
        place = self.recipe.index(flag)
        return Scripts(self.server, self.script, self.recipe[:place] + self.recipe[place + 2:])

    def finish(self, job: Job, status: int) -> Ended:
        ended = job.wait()
        assert ended.status == status, "".join((folder / "stderr").read_text()[-2000:] for folder in job.folders)
        return ended

    def start(self, out: Path, *flags: str, ranks: int = 1) -> Job:
        return self.server.launch([self.script, *self.recipe, "--out", str(out), *flags], ranks, self.before)

    def train(self, out: Path, *flags: str, ranks: int = 1, status: int = 0) -> Ended:
        return self.finish(self.start(out, *flags, ranks=ranks), status)

    def whole(self, ranks: int, *flags: str) -> Run:
        """A run that nothing interrupts; made once for all tests, which only read it."""
        if (ranks, flags) not in self.runs:
            folder = self.server.folder / f"whole-{self.script}-{len(self.runs)}"
            self.train(folder, *flags, ranks=ranks)
            self.runs[ranks, flags] = Run(folder)
        return self.runs[ranks, flags]

    def evaluate(self, *flags: str, ranks: int = 1, status: int = 0) -> Ended:
        return self.finish(self.server.launch(["evaluate.py", *flags], ranks), status)

    def torchrun(self, ranks: int, out: Path, *flags: str, nodes: tuple[str, ...] = ("--standalone",)) -> subprocess.Popen:
        """The real launcher, in a process group of its own. ranks: of this node."""
        command = [sys.executable, "-m", "torch.distributed.run", *nodes, f"--nproc_per_node={ranks}", self.script,
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
def tiny_llama_folder(data_file, tmp_path_factory) -> Path:
    """Random weights: 2 layers, 32 wide, 4 heads that share 2 of keys and values, 256 positions; a byte-level tokenizer that
    has learnt the small data's words, so that a prompt has few tokens; pad = eos."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([data_file.read_text()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>",
                            clean_up_tokenization_spaces=False).save_pretrained(folder)
    config = LlamaConfig(vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=1,
                         tie_word_embeddings=True, initializer_range=0.2)  # large enough that every token matters
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def warm_server(tmp_path_factory):
    server = WarmServer(tmp_path_factory.mktemp("jobs"))
    yield server
    server.close()


SHARED = ["--batch-size", "13", "--epochs", "5", "--log-every", "1", "--precision", "fp32"]


@pytest.fixture(scope="session")
def scripts(warm_server, data_file, tiny_bert_folder) -> Scripts:
    """41 windows in batches of 13: 4 steps an epoch, one of them of 2 windows; 5 epochs, 20 steps."""
    return Scripts(warm_server, "train_bert.py", ["--model", str(tiny_bert_folder), "--train-data", str(data_file),
                                                  "--max-length", "128", "--overlap", "32", "--lr", "1e-3", *SHARED])


@pytest.fixture(scope="session")
def llama_scripts(warm_server, data_file, tiny_llama_folder) -> Scripts:
    """41 questions on 14 passages; as many steps."""
    return Scripts(warm_server, "train_llama.py", ["--model", str(tiny_llama_folder), "--train-data", str(data_file),
                                                   "--rank", "4", "--alpha", "8", "--lr", "1e-2", *SHARED])


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
        """Weights ("model:..." or "lora:...") and optimizer ("optimizer:...") of a checkpoint."""
        folder = self.last() if step is None else self.folder / f"step-{step:06d}"
        return {f"{path.stem}:{name}": tensor for path in sorted(folder.glob("*.safetensors"))
                for name, tensor in load_file(path).items()}

    def state(self) -> dict:
        return json.loads((self.last() / "state.json").read_text())

    def product(self) -> dict[str, Tensor]:
        (path,) = (self.folder / "model").glob("*.safetensors")
        return load_file(path)

    def wait_for_step(self, step: int) -> None:
        """Until the log has a line on `step`."""
        deadline = time.monotonic() + TIMEOUT
        log = self.folder / "log.jsonl"
        while not log.exists() or f'"step": {step},' not in log.read_text():
            assert time.monotonic() < deadline, f"no step {step} in {self.folder}"
            time.sleep(0.005)

    def gradients(self) -> Tensor:
        """[steps, parameters] what each step's update was made from, of a run that saved them all: AdamW's running mean of the
        gradients (exp_avg), m_t = b m_(t-1) + (1 - b) g_t, solved for g_t."""
        beta1 = 0.9
        means = [torch.cat([tensor.flatten() for name, tensor in sorted(self.tensors(step).items())
                            if name.endswith(".exp_avg")]) for step in self.steps()]
        return torch.stack([(mean - beta1 * before) / (1 - beta1)
                            for before, mean in zip([torch.zeros_like(means[0]), *means], means, strict=False)])

    def assert_same_computation(self, reference: Run) -> None:
        """In double precision, all of 20 steps saved: gradients, losses and weights."""
        assert self.steps() == reference.steps() == list(range(1, 21))
        expected = reference.gradients()
        error = (self.gradients() - expected).norm(dim=1) / expected.norm(dim=1)  # [steps]
        assert error.max() < 1e-10
        losses = reference.losses()
        assert self.losses() == pytest.approx(losses, abs=1e-9, rel=0) and len(losses) == 20
        for step in reference.steps():
            tensors = self.tensors(step)
            for name, tensor in reference.tensors(step).items():
                if not name.startswith("optimizer:"):
                    torch.testing.assert_close(tensors[name], tensor, atol=1e-9, rtol=0, msg=f"step {step}: {name}")

    def assert_equal_to_the_bit(self, reference: Run) -> None:
        """Weights, optimizer, counters, losses, and the product."""
        for found, expected in ((self.tensors(), reference.tensors()), (self.product(), reference.product())):
            assert found.keys() == expected.keys()
            assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
        assert self.state() == reference.state()
        assert self.losses() == reference.losses()


@pytest.fixture(scope="session")
def read_run():
    return Run
