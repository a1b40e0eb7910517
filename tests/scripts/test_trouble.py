"""What goes wrong outside the program: a full disk, a second process in the same run, a rank that ends. One line each; and the
run goes on from its last checkpoint as if nothing had happened."""

from __future__ import annotations

import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from qa.errors import UserError
from qa.files import check_out, writing
from qa.llama.gguf import check_gguf

ROOT = Path(__file__).parents[2]
SAVE_ALL = ("--save-every", "1", "--keep", "30")


def with_limit(num_bytes: int) -> str:
    """What a disk does that is full: no file may be longer. (Python ignores the signal, so that writing fails.)"""
    return f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({num_bytes}, {num_bytes}))"


@pytest.fixture(scope="module")
def stopped_folder(scripts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    scripts.train(folder, *SAVE_ALL, "--stop-after", "10")
    return folder


@pytest.mark.parametrize("num_bytes", [0, 3000, 50_000])  # the log's next line, the state, the tensors do not fit
def test_disk_full_while_a_checkpoint_is_saved(num_bytes, stopped_folder, scripts, read_run, monkeypatch, tmp_path):
    folder = shutil.copytree(stopped_folder, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(scripts, "before", with_limit(num_bytes))
        job = scripts.start(folder, *SAVE_ALL, "--resume")
        ended = job.wait()
    assert ended.status != 0 and "Traceback" not in ended.err
    assert num_bytes == 0 or ended.status == 2 and ended.last_line.startswith("error: ") and "too large" in ended.last_line
    scripts.train(folder, *SAVE_ALL, "--resume")
    read_run(folder).assert_equal_to_the_bit(scripts.whole(1))


def test_what_the_libraries_raise_while_they_write(tmp_path):
    for error in (OSError(28, "No space left on device"), SafetensorError("I/O error: No space"), Exception("No space")):
        with pytest.raises(UserError, match="run cannot be written .*No space.*make room"), writing(tmp_path / "run"):
            raise error
    with pytest.raises(KeyError), writing(tmp_path):  # a mistake of ours
        raise KeyError("x")


def test_a_second_process_in_a_run_is_refused_and_a_dead_one_is_not_in_it(scripts, read_run, tmp_path):
    job = scripts.start(tmp_path / "run", "--epochs", "400", "--save-every", "1")
    read_run(tmp_path / "run").wait_for_step(3)
    ended = scripts.train(tmp_path / "run", "--epochs", "400", "--save-every", "1", "--resume", status=2)
    assert ended.last_line.startswith(f"error: --out {tmp_path / 'run'}: another process is training in it")
    job.send(signal.SIGKILL)
    job.wait()
    scripts.train(tmp_path / "run", "--epochs", "400", "--save-every", "1", "--resume", "--stop-after", "1")


def test_each_rank_says_what_ended_it(scripts, monkeypatch, tmp_path):
    monkeypatch.setattr(scripts, "before", """import os, torch, qa.bert.model as model
def fail(*_):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")
if os.environ["RANK"] == "1":
    model.span_loss = fail""")
    job = scripts.start(tmp_path / "run", ranks=2)
    assert job.wait().status == 1
    first, second = ((folder / "stderr").read_text().splitlines()[-1] for folder in job.folders)
    assert second.startswith("rank 1: error: out of GPU memory (CUDA out of memory")
    assert first.startswith("error: another rank has ended, and its own line says why")


def test_nan_on_another_rank_stops_all_with_one_line(scripts, read_run, monkeypatch, tmp_path):
    monkeypatch.setattr(scripts, "before", """import os, qa.bert.model as model
span_loss = model.span_loss
if os.environ["RANK"] == "1":
    model.span_loss = lambda *scores: span_loss(*scores) * float("nan")""")
    job = scripts.start(tmp_path / "run", ranks=2)
    ended = job.wait()
    assert ended.status == 1 and ended.last_line.startswith("stopped before the update of step 1: loss nan")
    assert "Traceback" not in ended.err and (job.folders[1] / "stderr").read_text() == ""
    assert (job.folders[1] / "status").read_text() == "1" and read_run(tmp_path / "run").steps() == []


def test_the_first_rank_of_each_node_asks_the_hub_and_the_others_find_its_files(scripts, tmp_path):
    """Two nodes of two ranks. A file stands for a node's cache."""
    (tmp_path / "ask.py").write_text("""import os, pathlib, sys, time
from qa.training import distributed
runtime = distributed.start()
cache = pathlib.Path(sys.argv[1], f"cache-{runtime.rank // 2}")
with distributed.first_of_each_node(runtime):
    found = cache.exists()
    time.sleep(0.0 if found else 0.5)
    cache.touch()
print("found" if found else "asked")
distributed.finish(runtime)
""")
    before = "import os; os.environ['LOCAL_RANK'] = str(int(os.environ['RANK']) % 2)"
    job = scripts.server.launch([str(tmp_path / "ask.py"), str(tmp_path)], 4, before)
    assert job.wait().status == 0
    assert [(folder / "stdout").read_text() for folder in job.folders] == ["asked\n", "found\n", "asked\n", "found\n"]


@pytest.mark.parametrize("script", ["train_bert.py", "evaluate.py"])
def test_ctrl_c_while_the_imports_run(script):
    process = subprocess.Popen([sys.executable, "-v", script], cwd=ROOT, text=True, stderr=subprocess.PIPE)
    for line in process.stderr:
        if line.startswith("import 'torch._") or "# code object from '" in line and "/torch/_" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait() == -signal.SIGINT and "Traceback" not in rest


def test_places_where_nothing_can_be_written(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    for name in ("dangling", "loop", "loop/run", "file", "file/run", "x" * 256, "a\0b"):
        with pytest.raises(UserError, match=f"--out {tmp_path}"):
            check_out(tmp_path / name)
    check_out(tmp_path / "new" / "run")


@pytest.mark.parametrize(("name", "make"), [("last", Path.mkdir), ("log.jsonl", Path.mkdir),
                                            ("model", lambda path: path.symlink_to("elsewhere"))])
def test_a_run_whose_files_are_something_else(name, make, stopped_folder, scripts, tmp_path):
    folder = shutil.copytree(stopped_folder, tmp_path / "run")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    ended = scripts.train(folder, *SAVE_ALL, "--resume", status=2)
    assert ended.last_line.startswith(f"error: --out {folder}: {name!r} in it is no ")


def gguf_header() -> bytes:
    """Version 3, no tensors, 5 pairs."""
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    numbers = {"llama.block_count": 1, "llama.embedding_length": 4, "llama.feed_forward_length": 8}
    pairs = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    pairs += b"".join(text(name) + struct.pack("<II", 4, number) for name, number in numbers.items())
    pairs += text("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, 2) + struct.pack("<ff", 0.5, 0.25)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 5) + pairs


def test_a_gguf_header_with_a_flipped_bit(tmp_path):
    """Each bit in turn. A nested array, which the format allows and transformers cannot read, is one of them."""
    header, path, num_refused = gguf_header(), tmp_path / "model.gguf", 0
    path.write_bytes(header)
    check_gguf(path)
    for bit in range(0, 8 * len(header), 3):
        damaged = bytearray(header)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            check_gguf(path)
        except UserError as error:
            num_refused += 1
            assert str(path) in str(error)
    assert num_refused > 200
