"""What is wrong with the input is said in one line that names the flag or the file, with exit status 2 and no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from transformers import AutoTokenizer, DebertaConfig, DebertaModel

import evaluate
import train_bert
from qa.errors import exit_status

ROOT = Path(__file__).parents[2]
SMALL = ("--max-length", "128", "--overlap", "32", "--batch-size", "13", "--epochs", "1", "--precision", "fp32")


@pytest.fixture
def error_of(monkeypatch, capsys):
    """error_of(script, *command line): the one line, in this process, without "error: "."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def run(script, *flags: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        capsys.readouterr()
        status = exit_status(script.main)
        return the_line(status, capsys.readouterr().err)

    return run


def the_line(status: int, err: str) -> str:
    assert status == 2 and err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err.removeprefix("error: ")


@pytest.fixture
def train_error(error_of, tiny_bert_folder, data_file, tmp_path):
    """train_error(*flags): with a sound command line before them; nothing may be written."""

    def run(*flags: object) -> str:
        """`flags` after a sound command line."""
        line = error_of(train_bert, "--model", tiny_bert_folder, "--train-data", data_file, "--out", tmp_path / "run", *SMALL,
                        *flags)
        assert not (tmp_path / "run").exists()
        return line

    return run


# ---- data -----------------------------------------------------------------------------------------------------

QUESTION = {"id": "1", "question": "Who?", "answers": [{"text": "cat", "answer_start": 0}]}
FILES = {
    "empty": ("", "empty"),
    "not-json": ("id,question\n1,Who?", "not JSON"),
    "cut-off": ('{"version": "1.1", "data": [', "not JSON"),
    "list": ([QUESTION], "not SQuAD JSON"),
    "rows": ({"data": [QUESTION | {"context": "cats"}]}, "paragraphs"),
    "no-data": ({"version": "1.1"}, "version"),
    "no-question": ({"data": [{"title": "t", "paragraphs": [{"context": "cats", "qas": []}]}]}, "no question"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_squad(name, error_of, train_error, tiny_bert_folder, tmp_path):
    content, found = FILES[name]
    path = tmp_path / f"{name}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    for line in (train_error("--train-data", path), train_error("--dev-data", path),
                 error_of(evaluate, "--ckpt", tiny_bert_folder, "--data", path)):
        assert str(path) in line and found in line


def test_files_that_are_not_there(error_of, train_error, tiny_bert_folder, tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        assert str(path) in train_error("--train-data", path)
        assert str(path) in error_of(evaluate, "--ckpt", tiny_bert_folder, "--data", path)


def test_nothing_to_train_on(train_error, tmp_path):
    passage = {"context": "The cat sat.", "qas": [{"id": "1", "question": "Who sat?"}]}
    (tmp_path / "questions.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": [passage]}]}))
    assert "the file has no answers" in train_error("--train-data", tmp_path / "questions.json")
    passage["qas"][0]["answers"] = [{"text": "cat", "answer_start": 4}]
    (tmp_path / "one.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": [passage]}]}))
    assert train_error("--train-data", tmp_path / "one.json", "--held-out", "0.5").startswith("--held-out 0.5: ")


# ---- models ---------------------------------------------------------------------------------------------------


def test_models_that_are_not_there(error_of, train_error, data_file, tmp_path):
    """Without a hub: said with what works without one."""
    (tmp_path / "folder").mkdir()
    for value, found in (("no-such-model", "without the hub: "), ("nobody/no-such-model", "without the hub: "),
                         (tmp_path / "none", "no such file"), ("./none", "no such file"), (tmp_path / "folder", "config.json"),
                         (data_file, "a file"), ("pypi:no-such-package", "not installed"), ("", "")):
        assert train_error("--model", value).startswith(f"--model {value}: ")
        assert found in train_error("--model", value)
        if value:
            line = error_of(evaluate, "--ckpt", value, "--data", data_file)
            assert line.startswith(f"--ckpt {value}: ") and found in line


def test_checkpoint_of_another_family(error_of, train_error, tiny_bert_folder, data_file, tmp_path):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 600}
    DebertaModel(DebertaConfig(**small)).save_pretrained(tmp_path / "deberta")
    AutoTokenizer.from_pretrained(tiny_bert_folder).save_pretrained(tmp_path / "deberta")
    for line in (train_error("--model", tmp_path / "deberta"),
                 error_of(evaluate, "--ckpt", tmp_path / "deberta", "--data", data_file)):
        assert "'deberta'" in line and "'bert'" in line


def test_damaged_models(train_error, tiny_bert_folder, tmp_path):
    damages = {"config.json": b"{", "model.safetensors": b"\0" * 100, "tokenizer.json": b"{"}
    for name, content in damages.items():
        folder = shutil.copytree(tiny_bert_folder, tmp_path / name)
        (folder / name).write_bytes(content)
        assert str(folder) in train_error("--model", folder), name
        (folder / name).unlink()
        assert str(folder) in train_error("--model", folder), name


def test_a_run_without_its_product_yet(error_of, data_file, tmp_path):
    (tmp_path / "options.json").write_text("{}")
    assert "has not written its model yet" in error_of(evaluate, "--ckpt", tmp_path, "--data", data_file)


# ---- flags ----------------------------------------------------------------------------------------------------


def test_flags(error_of, train_error):
    for flags, found in [
        (("--no-such-flag", "3"), "--no-such-flag"), (("--learning-rate", "3"), "--learning-rate"), (("stray",), "stray"),
        (("--lr", "fast"), "--lr"), (("--lr",), "--lr"), (("--lr", "nan"), "--lr nan"), (("--lr", "-1"), "--lr -1"),
        (("--precision", "fp8"), "fp8"), (("--batch-size", "0"), "--batch-size 0"), (("--epochs", "0"), "--epochs 0"),
        (("--warmup", "2"), "--warmup 2"), (("--held-out", "1"), "--held-out 1"), (("--dropout", "1"), "--dropout 1"),
        (("--keep", "0"), "--keep 0"), (("--micro-tokens", "-1"), "--micro-tokens -1"), (("--out", ""), "--out"),
        (("--max-length", "129"), "--max-length 129"), (("--overlap", "128"), "--overlap 128"),
        (("--overlap", "126"), "--overlap 126"), (("--overlap", "-1"), "--overlap -1"),
    ]:
        assert found in train_error(*flags), flags
    assert "at most 61" in train_error("--overlap", "128")  # half of the window, less the special tokens


def test_flags_of_evaluate(error_of, tiny_bert_folder, data_file, tmp_path):
    data = ("--data", data_file)
    predictions = tmp_path / "predictions.json"
    predictions.write_text(json.dumps({}))
    assert "--ckpt" in error_of(evaluate, *data)
    assert "--predictions" in error_of(evaluate, *data, "--ckpt", tiny_bert_folder, "--predictions", predictions)
    assert "--na-probs" in error_of(evaluate, *data, "--ckpt", tiny_bert_folder, "--na-probs", predictions)
    assert "--max-length 384" in error_of(evaluate, *data, "--ckpt", tiny_bert_folder)  # 128 positions
    assert str(tmp_path / "none.json") in error_of(evaluate, *data, "--predictions", tmp_path / "none.json")
    assert str(predictions) in error_of(evaluate, *data, "--predictions", predictions)
    assert str(data_file) in error_of(evaluate, *data, "--ckpt", tiny_bert_folder, "--max-length", "128", "--overlap", "32",
                                      "--out", data_file)
    for flags in (("--base", tiny_bert_folder), ("--merge-into", tmp_path / "merged"), ("--decode", "exact"),
                  ("--trace", "1")):
        assert error_of(evaluate, *data, "--ckpt", tiny_bert_folder, *flags).startswith(flags[0])


def test_against_what_is_no_evaluation(error_of, data_file, tmp_path):
    """Said before a model is looked for."""
    question_id = json.loads(data_file.read_text())["data"][0]["paragraphs"][0]["qas"][0]["id"]
    (tmp_path / "empty").mkdir()
    bad = {"text.json": "EM 5", "list.json": "[]", "other.json": '{"no such id": "x"}',
           "numbers.json": json.dumps({question_id: 1}), "half.json": json.dumps({question_id: {"exact": 1.0}}),
           "both.json": json.dumps({question_id: {"prediction": ["x"]}})}
    for name, content in bad.items():
        (tmp_path / name).write_text(content)
    for name in (*bad, "none", "none.json", "empty"):
        line = error_of(evaluate, "--ckpt", "no-such-model", "--data", data_file, "--against", tmp_path / name)
        assert line.startswith(f"{tmp_path / name}: ") and "expected" in line or "made for other data" in line, line
    document = json.loads(data_file.read_text())
    for qa in (qa for article in document["data"] for paragraph in article["paragraphs"] for qa in paragraph["qas"]):
        qa["answers"] = []
    (tmp_path / "questions.json").write_text(json.dumps(document))
    assert error_of(evaluate, "--ckpt", "no-such-model", "--data", tmp_path / "questions.json", "--against",
                    tmp_path / "half.json").startswith("--against: ")


def test_predictions_of_v2_for_data_of_v1(error_of, data_file, data_v2_file, tmp_path):
    qas = [qa for article in json.loads(data_v2_file.read_text())["data"] for paragraph in article["paragraphs"]
           for qa in paragraph["qas"]]
    predictions = {qa["id"]: "" if qa["is_impossible"] else qa["answers"][0]["text"] for qa in qas}
    (tmp_path / "v2.json").write_text(json.dumps(predictions))
    (tmp_path / "na.json").write_text(json.dumps(dict.fromkeys(predictions, 0.5)))
    line = error_of(evaluate, "--predictions", tmp_path / "v2.json", "--data", data_file)
    assert str(tmp_path / "v2.json") in line and "v2.0 predictions" in line and "v1.1" in line
    answered = {name: answer for name, answer in predictions.items() if answer}
    (tmp_path / "v1.json").write_text(json.dumps(answered))
    assert error_of(evaluate, "--predictions", tmp_path / "v1.json", "--data", data_file, "--na-probs",
                    tmp_path / "na.json").startswith("--na-probs")


# ---- resuming -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(scripts, tmp_path_factory) -> Path:
    """A run that was stopped after two steps."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    scripts.train(folder, *SMALL, "--stop-after", "2")
    return folder


@pytest.fixture
def resume_error(error_of, run_folder, tiny_bert_folder, data_file, tmp_path):
    """resume_error(*flags): of a copy of the run, tmp_path / "run"; nothing in it may change."""
    folder = shutil.copytree(run_folder, tmp_path / "run")

    def run(*flags: object) -> str:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        line = error_of(train_bert, "--model", tiny_bert_folder, "--train-data", data_file, "--out", folder, "--lr", "1e-3",
                        "--log-every", "1", *SMALL, *flags)
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return line

    return run


def test_out_that_is_taken(resume_error, data_file):
    assert "already holds a run" in resume_error()
    assert f"--out {data_file}: " in resume_error("--out", data_file)


def test_resume_without_a_run(train_error, tmp_path):
    assert train_error("--resume").startswith(f"--resume: {tmp_path / 'run'} holds no run")


def test_resume_of_another_run(resume_error, tmp_path):
    line = resume_error("--resume", "--lr", "0.25", "--seed", "7")
    assert "--lr 0.25 (was 0.001)" in line and "--seed 7 (was 0)" in line and str(tmp_path / "run") in line
    for flags in (("--batch-size", "12"), ("--max-length", "100"), ("--dropout", "0.2")):
        assert f"{flags[0]} {flags[1]} (was " in resume_error("--resume", *flags)
    assert "--precision bf16: the run in" in resume_error("--resume", "--precision", "bf16")


def test_resume_with_changed_data(resume_error, data_file, tmp_path):
    """The same file name, and one question or one answer in it is another."""
    text = data_file.read_text()
    try:
        for change in ("question", "answer", "order"):
            document = json.loads(text)
            qas = document["data"][0]["paragraphs"][0]["qas"]
            if change == "question":
                qas[0]["question"] += " Please"
            elif change == "answer":
                qas[0]["answers"], qas[1]["answers"] = qas[1]["answers"], qas[0]["answers"]
            else:
                qas.reverse()
            data_file.write_text(json.dumps(document))
            assert "training examples are not those of" in resume_error("--resume"), change
    finally:
        data_file.write_text(text)


def test_resume_of_a_damaged_run(resume_error, tmp_path):
    folder = tmp_path / "run"
    state = (folder / "step-000002" / "state.json").read_bytes()
    (folder / "step-000002" / "state.json").write_bytes(state.replace(b"2", b"3", 1))
    assert str(folder / "step-000002" / "state.json") in resume_error("--resume")
    record = (folder / "options.json").read_bytes()
    for content in (b"", b"[]", record[:-20], record.replace(b"{", b"[", 1)):
        (folder / "options.json").write_bytes(content)
        assert str(folder / "options.json") in resume_error("--resume"), content


# ---- the scripts as people start them -------------------------------------------------------------------------


@pytest.mark.parametrize("command, found", [
    (("train_bert.py", "--train-data", "squad", "--out"), ("squad: the hub cannot be reached", "demo")),
    (("evaluate.py", "--ckpt", "bert-base-uncased", "--data", "demo", "--out"), ("--ckpt bert-base-uncased", "pypi:PACKAGE")),
])
def test_no_hub(command, found, tmp_path):
    ended = subprocess.run([sys.executable, *command, str(tmp_path / "run")], cwd=ROOT, text=True, capture_output=True,
                           timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")})
    line = the_line(ended.returncode, ended.stderr)
    assert all(words in line for words in found) and not (tmp_path / "run").exists()
