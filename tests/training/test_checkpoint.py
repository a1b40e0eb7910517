"""Checkpoints: what is saved comes back to the bit, damage is noticed, every kill leaves one that loads."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import qa.files as files_module
import qa.training.checkpoint as checkpoint_module
from qa.errors import UserError
from qa.files import damages, file_sha256
from qa.training.checkpoint import load_checkpoint, save_checkpoint
from qa.training.distributed import Runtime

ROOT = Path(__file__).parents[2]
ALONE = Runtime(0, 1, torch.device("cpu"))
FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def state_of(step: int) -> tuple[dict, dict]:
    """(tensors, state) that betray any mixture of two steps: every value is the step's number."""
    tensors = {"model": {"a": torch.full((3, 5), float(step)), "b": torch.full((), step)},
               "optimizer": {"exp_avg": torch.full((70,), float(step), dtype=torch.float64)}}
    return tensors, {"step": step, "options": {"lr": 1e-4, "data": "Zürich"}}


def save(run: Path, step: int, keep: int = 2) -> Path:
    return save_tensors(run, step, *state_of(step), keep)


def save_tensors(run: Path, step: int, tensors: dict, state: dict, keep: int = 2) -> Path:
    """Returns the new folder."""
    save_checkpoint(run, step, tensors, state, keep, ALONE)
    return run / (run / "last").read_text().split()[0]


def assert_holds(checkpoint, step: int) -> None:
    tensors, state = state_of(step)
    assert (checkpoint.step, checkpoint.state) == (step, state)
    assert checkpoint.tensors.keys() == tensors.keys()
    for stem, named in tensors.items():
        assert checkpoint.tensors[stem].keys() == named.keys()
        assert all(torch.equal(checkpoint.tensors[stem][name], value) for name, value in named.items())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def step_names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.name != "last")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Syncing guards against a power failure, which no test can see; without it these take half the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints, of steps 1 and 2."""
    save(tmp_path / "run", 1)
    save(tmp_path / "run", 2)
    return tmp_path / "run"


def flip(path: Path, position: int, mask: int = 1) -> None:
    content = path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(position % len(content))
        file.write(bytes([content[position] ^ mask]))


# ---- round trip ------------------------------------------------------------------------------------------


def test_round_trip_keeps_every_bit_of_every_type(tmp_path):
    generator = torch.Generator().manual_seed(0)
    types = [torch.float16, torch.bfloat16, torch.float32, torch.float64,
             torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
    named = {}
    for dtype in types:  # random bytes: NaNs with all kinds of payloads, infinities, subnormals, -0.0
        raw = torch.randint(0, 256, (17, 64 * dtype.itemsize), generator=generator, dtype=torch.uint8)
        named[str(dtype)] = raw.view(dtype)
        named[f"{dtype}-0d"] = raw.view(dtype)[3, 5].clone()
        named[f"{dtype}-empty"] = torch.empty(0, 4, dtype=dtype)
    named["bool"] = torch.rand(9, generator=generator) > 0.5
    named["signalling nan"] = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)
    named["grad"] = torch.nn.Parameter(torch.randn(3, generator=generator))
    save_tensors(tmp_path, 7, {"model": named, "nothing": {}}, {})
    loaded = load_checkpoint(tmp_path).tensors
    assert loaded["nothing"] == {} and loaded["model"].keys() == named.keys()
    for name, value in named.items():
        back = loaded["model"][name]
        assert (back.dtype, back.shape, back.device.type) == (value.dtype, value.shape, "cpu"), name
        assert torch.equal(bits(back), bits(value)), name


def test_loaded_tensors_do_not_depend_on_the_file(run):
    checkpoint = load_checkpoint(run)
    os.truncate(checkpoint.folder / "model.safetensors", 0)  # in a mapped file: a bus error
    assert_holds(checkpoint, 2)


def test_state_is_json_and_comes_back_equal(tmp_path):
    state = {"none": None, "text": "“Żółw” 🐢 \ud83d", "big": 2**80, "float": 0.1 + 0.2, "list": [[]]}
    folder = save_tensors(tmp_path, 1, {"model": {"a": torch.ones(1)}}, state)
    assert load_checkpoint(tmp_path).state == state
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # whoever may read one may read all
    assert "“Żółw” 🐢" in (folder / "state.json").read_text(encoding="utf-8")


# ---- which checkpoints there are -------------------------------------------------------------------------


def test_nothing_saved_is_none(tmp_path):
    assert load_checkpoint(tmp_path / "missing") is None
    (tmp_path / "log.jsonl").write_text("{}")
    (tmp_path / ".step-000001.tmp").mkdir()
    assert load_checkpoint(tmp_path) is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keeps_exactly_the_newest(tmp_path, keep):
    for step in (5, 10, 999_999, 1_000_000):
        save(tmp_path, step, keep)
    assert step_names(tmp_path) == sorted(["step-000010", "step-999999", "step-1000000"][-keep:])
    checkpoint = load_checkpoint(tmp_path)
    assert_holds(checkpoint, 1_000_000)
    assert checkpoint.warnings == []


@pytest.mark.parametrize("again", [1, 2])
def test_damaged_steps_that_a_run_makes_again_are_replaced(run, again):
    """Resumed from before step `again`, because that and later ones are damaged."""
    for step in range(again, 3):
        flip(run / f"step-00000{step}" / "state.json", 3)
    save(run, again)
    assert step_names(run) == [f"step-00000{step}" for step in range(1, again + 1)]
    checkpoint = load_checkpoint(run)
    assert_holds(checkpoint, again)
    assert checkpoint.warnings == []


def test_leftovers_of_killed_runs_are_removed_and_other_files_stay(run):
    (run / ".step-000003.tmp").mkdir()
    (run / ".step-000003.tmp" / "model.safetensors").write_bytes(b"half")
    (run / ".last.123.tmp").write_text("step-")
    (run / "options.json").write_text("{}")
    (run / "model").mkdir()
    assert load_checkpoint(run).warnings == []
    save(run, 3)
    assert step_names(run) == ["model", "options.json", "step-000002", "step-000003"]


def test_two_runs_never_mix(tmp_path):
    save(tmp_path / "a", 1)
    save(tmp_path / "b", 2)
    before = {path: file_sha256(path) for path in (tmp_path / "a").rglob("*") if path.is_file()}
    save(tmp_path / "b", 3)
    assert {path: file_sha256(path) for path in (tmp_path / "a").rglob("*") if path.is_file()} == before
    # a file of another run, whole in itself, is damage; so is a whole step under another step's name
    shutil.copy(tmp_path / "a/step-000001/model.safetensors", tmp_path / "b/step-000003/model.safetensors")
    assert_holds(load_checkpoint(tmp_path / "b"), 2)
    shutil.copytree(tmp_path / "a/step-000001", tmp_path / "a/step-000009")
    (tmp_path / "a/last").unlink()
    checkpoint = load_checkpoint(tmp_path / "a")
    assert checkpoint.step == 1 and f"{tmp_path / 'a/step-000009/manifest.json'}: belongs to step 1" in checkpoint.warnings


# ---- damage ----------------------------------------------------------------------------------------------


def assert_falls_back(run: Path, name: str) -> None:
    checkpoint = load_checkpoint(run)
    assert_holds(checkpoint, 1)
    assert any(f"step-000002/{name}" in line for line in checkpoint.warnings), checkpoint.warnings
    assert checkpoint.warnings[-1] == f"{run}: going on from step-000001"
    assert not any("\n" in line for line in checkpoint.warnings)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_noticed(run, name, place):
    path = run / "step-000002" / name
    size = path.stat().st_size
    flip(path, {"first": 0, "middle": size // 2, "last": size - 1}[place])
    assert_falls_back(run, name)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_flipped_byte_in_last_is_noticed_and_costs_nothing(run, place):
    size = (run / "last").stat().st_size
    flip(run / "last", {"first": 0, "middle": size // 2, "last": size - 1}[place])
    checkpoint = load_checkpoint(run)
    assert_holds(checkpoint, 2)
    assert checkpoint.warnings[0].startswith(f"{run / 'last'}: ")


def test_every_byte_of_the_manifest_and_of_last_counts(run):
    """Also the manifest's spaces; and in `last` the digit 2 that turns into 1 (mask 3), also a step."""
    manifest = run / "step-000002/manifest.json"
    for position in range(manifest.stat().st_size):
        mask = (0x01, 0x03, 0x20, 0x80)[position % 4]
        flip(manifest, position, mask)
        assert damages(manifest.parent) == [f"{manifest}: missing or damaged"], position
        flip(manifest, position, mask)
    for position in range((run / "last").stat().st_size):
        for mask in (0x01, 0x03, 0x20, 0x80):
            flip(run / "last", position, mask)
            checkpoint = load_checkpoint(run)
            assert checkpoint.step == 2 and checkpoint.warnings, position
            flip(run / "last", position, mask)
    assert load_checkpoint(run).warnings == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncate", "empty", "append", "delete", "folder"])
def test_a_truncated_longer_or_missing_file_is_noticed(run, name, damage):
    path = run / "step-000002" / name
    size = path.stat().st_size
    if damage in ("truncate", "empty"):
        os.truncate(path, size - 1 if damage == "truncate" else 0)
    elif damage == "append":
        path.write_bytes(path.read_bytes() + b"\n")
    else:
        path.unlink()
    if damage == "folder":
        path.mkdir()
    assert_falls_back(run, name)


def test_an_extra_file_is_noticed(run):
    (run / "step-000002" / "other.safetensors").write_bytes(b"")
    assert_falls_back(run, "other.safetensors")


@pytest.mark.parametrize("content", [None, b"", b"step-000002\n", b"step-000003 %s\n" % (b"0" * 64)])
def test_last_missing_damaged_or_pointing_nowhere(run, content):
    (run / "last").unlink() if content is None else (run / "last").write_bytes(content)
    checkpoint = load_checkpoint(run)
    assert_holds(checkpoint, 2)
    assert checkpoint.warnings[0].startswith(f"{run / 'last'}: ") and len(checkpoint.warnings) == 2
    save(run, 3)
    assert load_checkpoint(run).warnings == []


def test_no_whole_checkpoint_is_one_line_for_the_user(run):
    flip(run / "step-000002/model.safetensors", -1)
    (run / "step-000001/state.json").unlink()
    with pytest.raises(UserError) as error:
        load_checkpoint(run)
    assert re.fullmatch(r"\S+/run: .*step-000002/model\.safetensors: damaged.*step-000001/state\.json: "
                        r"cannot be read \(No such file or directory\).*--out", str(error.value))
    for step in (1, 2):
        shutil.rmtree(run / f"step-00000{step}")
    with pytest.raises(UserError, match="names step-000002, which is not there"):
        load_checkpoint(run)


# ---- kills -----------------------------------------------------------------------------------------------


def test_everything_is_on_the_disk_before_it_gets_its_name(run, monkeypatch):
    """For a power failure: the order of syncs, renames and deletions of one save."""
    log = []

    def record(owner, name, what):
        original = getattr(owner, name)

        def recorder(path, *rest):
            log.append((what, path))
            return original(path, *rest)

        monkeypatch.setattr(owner, name, recorder)

    record(checkpoint_module, "sync", "sync")
    record(files_module, "sync", "sync")
    record(os, "replace", "replace")
    record(Path, "rename", "rename")
    record(shutil, "rmtree", "delete")
    save(run, 3)
    hidden, last = run / ".step-000003.tmp", run / f".last.{os.getpid()}.tmp"
    oldest = run / ".step-000001.tmp"
    assert set(log[:5]) == {("sync", hidden / name) for name in FILES} | {("sync", hidden)}
    assert log[4:] == [("sync", hidden), ("rename", hidden), ("sync", run),
                       ("sync", last), ("replace", last), ("sync", run),
                       ("rename", run / "step-000001"), ("delete", oldest)]


# Imports torch once and forks for every line "<run> <step> <k>" on its standard input. The fork prints its
# id, saves `step`, step + 1, ... and prints each step when it is saved. With k >= 0 it saves one step only,
# and kills itself before its k-th file operation (Python's audit events tell of open, mkdir, rename, remove
# and rmdir).
SAVER = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:]
from test_checkpoint import save

def kill_before(k):
    def on_event(event, args):
        nonlocal k
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            k -= 1
            if k < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(on_event)

print("ready", flush=True)
for line in sys.stdin:
    run, step, k = line.split()
    pid = os.fork()
    if pid == 0:
        print(os.getpid(), flush=True)
        if int(k) >= 0:
            os.fsync = lambda descriptor: None
            kill_before(int(k))
        for step in range(int(step), int(step) + (1 if int(k) >= 0 else 2000)):
            save(Path(run), step)
            print(step, flush=True)
        os._exit(0)
    print("end", os.waitpid(pid, 0)[1], flush=True)
"""


class Saver:
    """The process that runs SAVER, and its current fork."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", SAVER, str(ROOT), str(Path(__file__).parent)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert self.line() == "ready"

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def start(self, run: Path, step: int, k: int = -1) -> int:
        """Returns the process id of the fork."""
        self.process.stdin.write(f"{run} {step} {k}\n")
        self.process.stdin.flush()
        return int(self.line())

    def wait(self) -> tuple[list[int], bool]:
        """The steps that the fork has acknowledged and that were not read yet, and whether it was killed."""
        steps = []
        while not (line := self.line()).startswith("end"):
            steps.append(int(line))
        return steps, int(line.split()[1]) == signal.SIGKILL


@pytest.fixture(scope="module")
def saver():
    saver = Saver()
    yield saver
    saver.process.stdin.close()
    try:
        saver.process.wait(timeout=10)
    finally:
        saver.process.kill()


def test_sigkill_at_20_random_instants(saver, tmp_path):
    draw = random.Random(0)
    run, step, num_leftovers = tmp_path / "run", 0, 0
    for _ in range(20):
        pid = saver.start(run, step)
        try:
            assert saver.line() == str(step)
            time.sleep(draw.uniform(0, 0.08))
        finally:
            os.kill(pid, signal.SIGKILL)
        steps, killed = saver.wait()
        assert killed
        num_leftovers += any(path.name.startswith(".") for path in run.iterdir())
        acknowledged = max(steps, default=step)
        found = load_checkpoint(run).step
        assert acknowledged <= found <= acknowledged + 1
        assert_holds(load_checkpoint(run), found)
        assert load_checkpoint(run).warnings == []
        step = found + 1
    assert num_leftovers > 0  # some kills did hit the middle of a save
    save(run, step)
    assert len(step_names(run)) == 2


@pytest.mark.parametrize("step", [3, 2])
def test_sigkill_before_every_single_file_operation(saver, run, tmp_path, step):
    """Step 3 after steps 1 and 2; and step 2 again, because it was damaged. After each kill the run goes on."""
    if step == 2:
        flip(run / "step-000002/state.json", 3)
    reached = set()
    for k in range(100):
        trial = tmp_path / f"trial-{k}"
        shutil.copytree(run, trial)
        saver.start(trial, step, k)
        steps, killed = saver.wait()
        checkpoint = load_checkpoint(trial)
        assert checkpoint.step in (step - 1, step)
        assert_holds(checkpoint, checkpoint.step)
        if step == 3 or checkpoint.step == 2:
            assert checkpoint.warnings == []
        reached.add(checkpoint.step)
        save(trial, checkpoint.step + 1)
        assert_holds(load_checkpoint(trial), checkpoint.step + 1)
        assert step_names(trial) == [f"step-00000{number}" for number in (checkpoint.step, checkpoint.step + 1)]
        if not killed:
            break
    assert steps == [step] and k > 15
    assert reached == {step - 1, step}
