"""Bad input of train_llama.py, and of evaluate.py with a LLaMA: one line that names the flag or the file, exit status 2.

What the scripts share (data files, flags, damaged runs) is tested by test_bad_input.py; all that can be wrong in the folder of
a model or an adapter by tests/llama.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qa.data.squad import load_squad


def the_line(ended) -> str:
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    return ended.err.removeprefix("error: ")


@pytest.fixture
def train_error(llama_scripts, tmp_path):
    """train_error(*flags): with a sound command line before them; nothing may be written."""

    def run(*flags: object) -> str:
        line = the_line(llama_scripts.train(tmp_path / "run", *map(str, flags), status=2))
        assert not (tmp_path / "run").exists()
        return line

    return run


def write_gguf(path: Path, architecture: str) -> Path:
    """A header that says what the model is, and nothing behind it."""
    key, value = b"general.architecture", architecture.encode()
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
                     + struct.pack("<IQ", 8, len(value)) + value)
    return path


def test_models_that_are_not_there_or_of_another_family(train_error, scripts, tiny_bert_folder, tiny_llama_folder, tmp_path):
    assert train_error("--model", "nobody/no-such-model").startswith("--model nobody/no-such-model: ")
    line = train_error("--model", tiny_bert_folder)
    assert str(tiny_bert_folder) in line and "'bert'" in line and "expected 'llama'" in line
    line = the_line(scripts.train(tmp_path / "run", "--model", str(tiny_llama_folder), status=2))
    assert str(tiny_llama_folder) in line and "'llama'" in line and "expected 'bert'" in line


def test_gguf_files_that_are_no_llama(train_error, tmp_path):
    line = train_error("--model", write_gguf(tmp_path / "other.gguf", "gpt2"))
    assert str(tmp_path / "other.gguf") in line and "'gpt2'" in line
    (tmp_path / "text.gguf").write_text("no gguf at all")
    line = train_error("--model", tmp_path / "text.gguf")
    assert str(tmp_path / "text.gguf") in line and "not a readable .gguf" in line
    assert str(tmp_path / "none.gguf") in train_error("--model", tmp_path / "none.gguf")


def test_tokenizer_without_offsets(train_error, tiny_llama_folder, tmp_path):
    folder = shutil.copytree(tiny_llama_folder, tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    line = train_error("--model", folder)
    assert str(folder) in line and "no offsets" in line


def test_flags_that_do_not_fit_the_model_or_the_data(train_error):
    assert train_error("--target", "q,kv").startswith("--target 'kv_proj' matches no layer")
    assert train_error("--target", "embed_tokens").startswith("--target names model.embed_tokens")
    assert train_error("--max-length", "300").startswith("--max-length 300: the model's context has 256")
    assert train_error("--max-length", "20").startswith("--max-length 20: ")
    assert train_error("--shots", "2").startswith("--shots: the plain prompt")
    assert train_error("--shots", "9", "--prompt", "engineered").startswith("--shots 9: ")


@pytest.fixture(scope="module")
def run_folder(llama_scripts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ended") / "run"
    llama_scripts.train(folder, "--epochs", "1")
    return folder


def test_resume_of_another_run(run_folder, llama_scripts):
    line = the_line(llama_scripts.train(run_folder, "--epochs", "1", "--resume", "--rank", "5", "--target", "q,v",
                                        "--lora-dropout", "0.5", "--prompt", "engineered", status=2))
    for words in ("--rank 5 (was 4)", "--target q,v (was q,k,v,o)", "--lora-dropout 0.5 (was 0.0)",
                  "--prompt engineered (was plain)"):
        assert words in line
    line = the_line(llama_scripts.train(run_folder, "--epochs", "1", status=2))
    assert f"--out {run_folder}: already holds a run" in line


def test_resume_with_another_base(llama_scripts, tiny_llama_folder, tmp_path):
    """The folder is the same, its weights are not."""
    base = shutil.copytree(tiny_llama_folder, tmp_path / "base")
    llama_scripts.train(tmp_path / "run", "--model", str(base), "--stop-after", "1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        LlamaForCausalLM(LlamaConfig.from_pretrained(base)).save_pretrained(base)
    line = the_line(llama_scripts.train(tmp_path / "run", "--model", str(base), "--resume", status=2))
    assert line.startswith(f"--resume: the weights of {base} are not those")


def test_trace_of_no_question_or_of_greedy_decoding(llama_scripts, tiny_llama_folder, data_file, tmp_path):
    def evaluate_error(*flags: str) -> str:
        return the_line(llama_scripts.evaluate("--ckpt", str(tiny_llama_folder), "--data", str(data_file), *flags,
                                               "--out", str(tmp_path / "out"), status=2))

    first = load_squad(str(data_file)).examples[0].id
    assert evaluate_error("--decode", "exact", "--trace", "none") == (
        f"--trace none: no question of {data_file} has this id; expected one such as {first}\n")
    assert evaluate_error("--trace", first).startswith("--trace has no effect on")
    assert not (tmp_path / "out").exists()


def test_adapter_with_a_base_that_is_not_its_own(run_folder, tiny_llama_folder, tiny_bert_folder, llama_scripts, data_file,
                                                 tmp_path):
    """Of the same shape and other weights; of another family; gone. As a base itself it is told where it belongs."""
    def evaluate_error(*flags: object) -> str:
        return the_line(llama_scripts.evaluate("--ckpt", str(run_folder), "--data", str(data_file), *map(str, flags),
                                               "--out", str(tmp_path / "out"), status=2))

    other = shutil.copytree(tiny_llama_folder, tmp_path / "other")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama_folder)).save_pretrained(other)
    line = evaluate_error("--base", other)
    assert str(run_folder) in line and str(tiny_llama_folder) in line and str(other) in line and "weights differ" in line
    assert "expected 'llama'" in evaluate_error("--base", tiny_bert_folder)
    assert evaluate_error("--base", tmp_path / "gone").startswith(f"--base {tmp_path / 'gone'}: ")
    merge = evaluate_error("--merge-into", data_file / "merged")
    assert merge.startswith(f"--merge-into {data_file / 'merged'}: ") and not (tmp_path / "out").exists()
    line = the_line(llama_scripts.train(tmp_path / "run", "--model", str(run_folder), status=2))
    assert "adapter" in line and "--ckpt" in line
