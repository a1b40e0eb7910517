"""The commands as people type them: four processes, SQuAD from the hub through `datasets`, nothing said about the folders.

One worked case. The hub's repository rajpurkar/squad has a parquet file for each split, with a row for each question:

    {"id": "0-0", "title": "Arl", "context": "The bridge of Arl was built in 1800. Its builder, ...",
     "question": "When was the bridge built?", "answers": {"text": ["1800"], "answer_start": [31]}}

Where the current folder has a folder of that name, `datasets` reads it instead of the hub. Ours has 41 rows to train on and
the first 12 of them to validate on. Then `torchrun --nproc_per_node=4 train_bert.py --model tiny` makes
runs/bert-tiny-squad, and `python evaluate.py --ckpt runs/bert-tiny-squad` prints the scores that the run ended with.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
CONFIGS = {"squad": "plain_text", "squad_v2": "squad_v2"}  # the hub's name of the one configuration: a folder
SCHEMA = pa.schema({"id": pa.string(), "title": pa.string(), "context": pa.string(), "question": pa.string(), "answers":
                    pa.struct({"text": pa.list_(pa.string()), "answer_start": pa.list_(pa.int32())})})
CARD = """---
dataset_info:
  config_name: {config}
  features:
  - {{name: id, dtype: string}}
  - {{name: title, dtype: string}}
  - {{name: context, dtype: string}}
  - {{name: question, dtype: string}}
  - name: answers
    sequence: [{{name: text, dtype: string}}, {{name: answer_start, dtype: int32}}]
configs:
- config_name: {config}
  data_files:
  - {{split: train, path: {config}/train-*}}
  - {{split: validation, path: {config}/validation-*}}
---
"""


def rows_of(document: dict) -> list[dict]:
    return [{"id": qa["id"], "title": article["title"], "context": paragraph["context"], "question": qa["question"],
             "answers": {key: [answer[key] for answer in qa["answers"]] for key in ("text", "answer_start")}}
            for article in document["data"] for paragraph in article["paragraphs"] for qa in paragraph["qas"]]


def write_repository(name: str, document: dict, folder: Path) -> None:
    """The hub's repository of a data set, under `folder`."""
    repository, config, rows = folder / "rajpurkar" / name, CONFIGS[name], rows_of(document)
    (repository / config).mkdir(parents=True)
    (repository / "README.md").write_text(CARD.format(config=config))
    for split, part in (("train", rows), ("validation", rows[:12])):
        pq.write_table(pa.Table.from_pylist(part, SCHEMA), repository / config / f"{split}-00000-of-00001.parquet")


def surroundings(folder: Path) -> dict[str, str]:
    """No hub, and no cache of datasets but the test's own."""
    return {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_here(folder: Path, scripts, *argv: str):
    """A script in one process, with `folder` as the current one."""
    before = f"import os; os.chdir({str(folder)!r}); os.environ.update({surroundings(folder)!r})"
    return scripts.finish(scripts.server.launch([str(ROOT / argv[0]), *argv[1:]], before=before), 0)


def scores(output: str) -> str:
    """The last "EM 55.32, F1 66.90 (1,495 questions)..." that a script printed."""
    return re.findall(r"EM [\d.]+, F1 .*", output)[-1]


def test_worked_case(data_file):
    row = rows_of(json.loads(data_file.read_text()))[0]
    assert row["context"].startswith("The bridge of Arl was built in 1800. Its builder, ") and list(row) == SCHEMA.names
    assert (row["question"], row["answers"]) == ("When was the bridge built?", {"text": ["1800"], "answer_start": [31]})


def test_four_ranks_under_torchrun_end_with_the_scores_of_evaluate(data_file, tiny_bert_folder, scripts, tmp_path):
    write_repository("squad", json.loads(data_file.read_text()), tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_bert_folder)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4"]
    flags = ["--model", "tiny", "--max-length", "128", "--overlap", "32", "--lr", "1e-2", "--epochs", "5",
             "--precision", "fp32"]
    ended = subprocess.run([*torchrun, str(ROOT / "train_bert.py"), *flags], cwd=tmp_path, text=True, capture_output=True,
                           timeout=300, env={**os.environ, **surroundings(tmp_path)})
    assert ended.returncode == 0, ended.stderr
    assert "41 training questions" in ended.stdout and "4 × cpu" in ended.stdout
    assert (tmp_path / "cache" / "datasets").exists() and "Generating" not in ended.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["bert-tiny-squad"]

    evaluated = run_here(tmp_path, scripts, "evaluate.py", "--ckpt", "runs/bert-tiny-squad", "--precision", "fp32")
    assert scores(ended.stdout) == scores(evaluated.out)
    assert "(12 questions)" in scores(ended.stdout) and not scores(ended.stdout).startswith("EM 0.00")


def test_squad_v2_with_its_threshold(data_v2_file, tiny_llama_folder, scripts, tmp_path):
    write_repository("squad_v2", json.loads(data_v2_file.read_text()), tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_llama_folder)
    flags = ["--model", "tiny", "--train-data", "squad_v2", "--lr", "1e-2", "--precision", "fp32"]
    ended = run_here(tmp_path, scripts, "train_llama.py", *flags)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["lora-tiny-squad_v2"]
    evaluated = run_here(tmp_path, scripts, "evaluate.py", "--ckpt", "runs/lora-tiny-squad_v2", "--data", "squad_v2",
                         "--precision", "fp32")
    assert scores(ended.out) == scores(evaluated.out)
    assert "(12 questions); with an answer: " in scores(ended.out) and "without: " in scores(ended.out)
    assert "Generating" not in ended.err + evaluated.err
