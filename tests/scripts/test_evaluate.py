"""evaluate.py, on models of every origin and on files of predictions."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertConfig, BertForQuestionAnswering

from qa.data.squad import load_squad

FP32 = ("--precision", "fp32")
FILES = {"metrics.json", "per_question.json", "predictions.json", "nbest.json", "conditions.json", "environment.json"}
CONFIDENCE_KEYS = {"ece", "coverage_area"}
V1_KEYS = {"exact_match", "f1", "total", *CONFIDENCE_KEYS}
V2_KEYS = {*CONFIDENCE_KEYS, "exact", "f1", "total",
           *(f"{half}_{name}" for half in ("HasAns", "NoAns") for name in ("exact", "f1", "total")),
           "best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"}


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def run_folder(scripts, tmp_path_factory) -> Path:
    """A run on v1.1 data."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    scripts.train(folder, "--lr", "3e-3", "--max-answer-length", "7")
    return folder


@pytest.fixture(scope="module")
def qa_folder(tiny_bert_folder, tmp_path_factory) -> Path:
    """A question-answering checkpoint that transformers wrote."""
    folder = tmp_path_factory.mktemp("qa")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        BertForQuestionAnswering(BertConfig.from_pretrained(tiny_bert_folder, initializer_range=0.3)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert_folder).save_pretrained(folder)
    return folder


# ---- models ---------------------------------------------------------------------------------------------------


def brute_force_answers(folder: Path, questions, max_length: int, overlap: int, max_answer_length: int) -> dict[str, str]:
    """transformers' own windows and model, then a loop over all spans of all windows."""
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    answers = {}
    for example, context in questions:
        batch = tokenizer(example.question, context, truncation="only_second", max_length=max_length, stride=overlap,
                          return_overflowing_tokens=True, return_offsets_mapping=True, padding=True, return_tensors="pt")
        with torch.no_grad():
            scores = model(batch["input_ids"], attention_mask=batch["attention_mask"], token_type_ids=batch["token_type_ids"])
        spans = []
        for row, (start, end) in enumerate(zip(scores.start_logits.tolist(), scores.end_logits.tolist(), strict=True)):
            passage = [token for token, part in enumerate(batch.sequence_ids(row)) if part == 1]
            offsets = batch["offset_mapping"][row].tolist()
            spans += [(start[s] + end[e], offsets[s][0], offsets[e][1]) for s in passage for e in passage
                      if s <= e < s + max_answer_length]
        _, first, past = max(spans)
        answers[example.id] = context[first:past]
    return answers


@pytest.mark.parametrize("source", ["ours", "transformers'"])
def test_answers_are_those_of_transformers_and_brute_force(source, run_folder, qa_folder, data_file, scripts, tmp_path):
    """And a window that cuts most passages in two."""
    folder = run_folder / "model" if source == "ours" else qa_folder
    scripts.evaluate("--ckpt", str(folder), "--data", str(data_file), *FP32, "--max-length", "70", "--overlap", "20",
                     "--max-answer-length", "9", "--out", str(tmp_path))
    passages = load_squad(str(data_file)).passages
    questions = [(example, passage.text) for passage in passages for example in passage.examples][:30]
    expected = brute_force_answers(folder, questions, 70, 20, 9)
    predictions = read(tmp_path, "predictions")
    assert {name: predictions[name] for name in expected} == expected and len(expected) == 30
    assert len(set(expected.values())) > 10, "else this test shows little"


def test_a_run_means_its_product_with_the_settings_of_its_training(run_folder, data_file, scripts, tmp_path):
    ended = scripts.evaluate("--ckpt", str(run_folder), "--data", str(data_file))
    results = run_folder / "evaluation-small"
    assert names(results) == FILES and str(results) in ended.out
    conditions = read(results, "conditions")
    assert (conditions["max_length"], conditions["overlap"], conditions["max_answer_length"]) == (128, 32, 7)
    metrics = read(results, "metrics")
    assert metrics.keys() == V1_KEYS and metrics["total"] == 41 and f"F1 {metrics['f1']:.2f}" in ended.out
    context_of = {example.id: passage.text for passage in load_squad(str(data_file)).passages for example in passage.examples}
    for name, entries in read(results, "nbest").items():
        assert entries[0]["text"] == read(results, "predictions")[name]
        assert all(context_of[name][entry["start_char"]:entry["end_char"]] == entry["text"] for entry in entries)
        assert [entry["score"] for entry in entries] == sorted((entry["score"] for entry in entries), reverse=True)
        assert 0 < sum(entry["confidence"] for entry in entries) < 1 + 1e-6


def test_two_ranks_write_the_same_files_as_one(run_folder, data_file, scripts, tmp_path):
    command = ["--ckpt", str(run_folder), "--data", str(data_file), *FP32, "--micro-tokens", "600"]
    scripts.evaluate(*command, "--out", str(tmp_path / "1"))
    ended = scripts.evaluate(*command, "--out", str(tmp_path / "2"), ranks=2)
    assert names(tmp_path / "1") == names(tmp_path / "2") == FILES
    for name in FILES - {"environment.json"}:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert ended.out.count("EM ") == 3 and ended.out.count("written to") == 1 and ended.out_of_others == ""


@pytest.mark.parametrize("decode", ["greedy", "exact"])
def test_ranks_do_not_change_llamas_answers_on_a_passage_in_pieces(decode, tiny_llama_folder, data_file, scripts, tmp_path):
    """Each rank gets whole passages. A batch is one row, whatever the ranks, so that even the last bits are the same."""
    document = json.loads(data_file.read_text())
    paragraphs = [paragraph for article in document["data"] for paragraph in article["paragraphs"]][:4]
    long = " ".join(passage.text for passage in load_squad(str(data_file)).passages * 2)
    assert len(AutoTokenizer.from_pretrained(tiny_llama_folder)(long).input_ids) > 2 * 256, "else there are no 3 pieces"
    paragraphs[1]["context"] = long
    for qa in paragraphs[1]["qas"]:
        del qa["answers"]
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"version": "1.1", "data": [{"title": "Bridges", "paragraphs": paragraphs}]}))
    results = {}
    for ranks in (1, 2, 3):
        ended = scripts.evaluate("--ckpt", str(tiny_llama_folder), "--data", str(data), *FP32, "--decode", decode,
                                 "--max-answer-length", "8", "--micro-tokens", "50", "--out", str(tmp_path / str(ranks)),
                                 ranks=ranks)
        assert "1 of 4 passages are too long for 256 tokens: read in pieces" in ended.out and ended.out_of_others == ""
        results[ranks] = [(tmp_path / str(ranks) / name).read_bytes() for name in ("predictions.json", "nbest.json")]
    assert results[1] == results[2] == results[3]


def test_trace_prints_one_search_and_writes_nothing(tiny_llama_folder, data_file, scripts, tmp_path):
    question_id = load_squad(str(data_file)).examples[3].id
    ended = scripts.evaluate("--ckpt", str(tiny_llama_folder), "--data", str(data_file), *FP32, "--decode", "exact",
                             "--max-answer-length", "4", "--trace", question_id, "--out", str(tmp_path / "out"))
    assert "as the whole answer" in ended.out and "prefixes were run\nanswer 1: " in ended.out
    assert ended.out.splitlines()[-1].startswith("proof: ") and not (tmp_path / "out").exists()


def test_plain_encoder_is_scored_and_called_untrained(tiny_bert_folder, data_file, scripts, tmp_path):
    ended = scripts.evaluate("--ckpt", str(tiny_bert_folder), "--data", str(data_file), "--max-length", "128",
                             "--overlap", "32", "--out", str(tmp_path))
    assert "without a trained span head" in ended.out
    assert "without a trained span head" in " ".join(read(tmp_path, "conditions")["notes"])
    assert read(tmp_path, "metrics")["total"] == 41


def test_v2_data(run_folder, data_v2_file, scripts, tmp_path):
    """A model of v1.1 is warned about; every figure of the official script is there; the threshold is the user's."""
    command = ["--ckpt", str(run_folder), "--data", str(data_v2_file), *FP32]
    ended = scripts.evaluate(*command, "--out", str(tmp_path / "0"))
    assert "v1.1" in ended.err and names(tmp_path / "0") == FILES | {"null_odds.json"}
    metrics, odds = read(tmp_path / "0", "metrics"), read(tmp_path / "0", "null_odds")
    assert metrics.keys() == V2_KEYS and (metrics["total"], metrics["NoAns_total"]) == (41, 14)
    middle = sorted(odds.values())[20]
    scripts.evaluate(*command, "--na-threshold", str(middle), "--out", str(tmp_path / "1"))
    predictions = read(tmp_path / "1", "predictions")
    assert {name for name, answer in predictions.items() if not answer} == {name for name in odds if odds[name] > middle}
    assert read(tmp_path / "1", "metrics")["best_f1"] == metrics["best_f1"]


def test_file_without_answers_is_predicted_and_not_scored(run_folder, data_file, scripts, tmp_path):
    document = json.loads(data_file.read_text())
    for article in document["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                del qa["answers"]
    (tmp_path / "questions.json").write_text(json.dumps(document))
    out = tmp_path / "out"
    ended = scripts.evaluate("--ckpt", str(run_folder), "--data", str(tmp_path / "questions.json"), "--out", str(out))
    assert "no scores. The first 5 of 41:" in ended.out and names(out) == FILES - {"metrics.json", "per_question.json"}
    predictions = read(out, "predictions")
    assert len(predictions) == 41 and all(predictions.values())
    first = [qa for passage in document["data"][0]["paragraphs"] for qa in passage["qas"]][0]
    assert f"Q: {first['question']}" in ended.out and f"answer: {predictions[first['id']]}\n" in ended.out
    assert "gold" not in ended.out and ended.out.count("  Q: ") == ended.out.count("[[") == 5


def test_sample_is_of_whole_passages_and_says_so(run_folder, data_file, scripts, tmp_path):
    ended = scripts.evaluate("--ckpt", str(run_folder), "--data", str(data_file), "--max-questions", "9",
                             "--out", str(tmp_path))
    assert "a sample: 9 questions" in ended.out and read(tmp_path, "conditions")["sample"] is True
    assert read(tmp_path, "metrics")["total"] == 9 == len(read(tmp_path, "predictions"))


# ---- files of predictions -------------------------------------------------------------------------------------


def test_predictions_of_evaluate_score_as_the_model_did(run_folder, data_file, data_v2_file, scripts, tmp_path):
    for data in (data_file, data_v2_file):
        folder = tmp_path / data.stem
        scripts.evaluate("--ckpt", str(run_folder), "--data", str(data), "--out", str(folder))
        scripts.evaluate("--predictions", str(folder / "predictions.json"), "--data", str(data), "--out", str(folder / "again"))
        again = read(folder / "again", "metrics")
        assert again == {name: read(folder, "metrics")[name] for name in again} and "f1" in again
        assert names(folder / "again") == FILES - {"nbest.json"}
        questions, first = (read(place, "per_question") for place in (folder / "again", folder))
        unknown = {"confidence": None, "no_answer_score": None}
        assert questions == {name: entry | unknown for name, entry in first.items()}


def test_missing_predictions_count_as_wrong_and_are_warned_about(data_file, scripts, tmp_path):
    examples = load_squad(str(data_file)).examples
    (tmp_path / "half.json").write_text(json.dumps({example.id: example.gold_texts[0] for example in examples[::2]}))
    ended = scripts.evaluate("--predictions", str(tmp_path / "half.json"), "--data", str(data_file),
                             "--out", str(tmp_path / "out"))
    assert read(tmp_path / "out", "metrics") == pytest.approx({"exact_match": 2100 / 41, "f1": 2100 / 41, "total": 41})
    assert "20 questions without a prediction" in ended.err


def test_against_tells_the_difference_from_each_kind_of_evaluation(run_folder, data_file, scripts, tmp_path):
    """A run that answers like itself does not differ; half the gold answers are better, and the official figures say by how
    much."""
    command = ["--ckpt", str(run_folder), "--data", str(data_file), *FP32]
    scripts.evaluate(*command, "--out", str(tmp_path / "1"))
    for name in ("", "predictions.json", "per_question.json"):
        ended = scripts.evaluate(*command, "--out", str(tmp_path / "2"), "--against", str(tmp_path / "1" / name))
        assert "\n  EM +0.00 [+0.00, +0.00], p 1;" in ended.out and "0 questions better, 0 worse\n" in ended.out
    examples = load_squad(str(data_file)).examples
    gold = tmp_path / "gold.json"
    gold.write_text(json.dumps({example.id: example.gold_texts[0] for example in examples[::2]}))
    ended = scripts.evaluate("--predictions", str(gold), "--data", str(data_file), "--against", str(tmp_path / "1"))
    metrics = read(tmp_path / "1", "metrics")
    assert "(7 articles, fewer than 10" in ended.out and f"this minus {tmp_path / '1'}, " in ended.out
    assert f"\n  EM {2100 / 41 - metrics['exact_match']:+.2f} [" in ended.out
    assert f"\n  F1 {2100 / 41 - metrics['f1']:+.2f} [" in ended.out
    ended = scripts.evaluate(*command, "--out", str(tmp_path / "2"), "--against", str(gold))
    assert "lacks 20 questions of the data" in ended.err and f"\n  EM {metrics['exact_match'] - 2100 / 41:+.2f} [" in ended.out

    sample = (*command, "--max-questions", "5", "--out", str(tmp_path / "sample"))  # of other questions: no difference to tell
    scripts.evaluate(*sample)
    ended = scripts.evaluate(*command, "--out", str(tmp_path / "2"), "--against", str(tmp_path / "sample"), status=2)
    assert "a sample, which lacks 36 of the 41 questions here; give the --max-questions" in ended.last_line
    ended = scripts.evaluate(*sample, "--against", str(tmp_path / "sample"))
    assert "0 questions better, 0 worse\n" in ended.out


@pytest.mark.squad
@pytest.mark.skipif("SQUAD_DIR" not in os.environ, reason="SQUAD_DIR is not set")
def test_published_systems_get_their_official_figures(scripts, tmp_path):
    folder = Path(os.environ["SQUAD_DIR"])
    flags = {"v1.1": [], "v2.0 without no-answer scores": [], "v2.0 with no-answer scores": ["--na-probs"],
             "v2.0 with no-answer scores, threshold 0.5": ["--na-probs", "--na-threshold", "0.5"]}
    for name, expected in json.loads((folder / "scoring" / "expected.json").read_text()).items():
        predictions = folder / "scoring" / name
        for case, metrics in expected.items():
            if case == "dev_file":
                continue
            more = list(flags[case])
            if more:
                more.insert(1, str(predictions.with_name(f"{predictions.stem}-na.json")))
            scripts.evaluate("--predictions", str(predictions), "--data", str(folder / expected["dev_file"]), *more,
                             "--out", str(tmp_path))
            assert read(tmp_path, "metrics") == pytest.approx(metrics, abs=1e-9, rel=0), f"{name}, {case}"



# ---- who decides on "no answer" -------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [{"version": "1.1"}, {}])
def test_without_answers_in_the_data_the_model_decides_on_no_answer(version, data_v2_file, run_folder, scripts, tmp_path):
    """The README's own form of a file to predict. A threshold below all scores makes a v2.0 model refuse all."""
    document = json.loads(data_v2_file.read_text())
    for article in document["data"]:
        for passage in article["paragraphs"]:
            passage["qas"] = [{"id": qa["id"], "question": qa["question"], "answers": []} for qa in passage["qas"]]
    data = tmp_path / "questions.json"
    data.write_text(json.dumps({**version, "data": document["data"]}))
    scripts.train(tmp_path / "v2", "--train-data", str(data_v2_file), "--epochs", "1", "--held-out", "0.2")
    for threshold, refused in (("-1000", 41), ("1000", 0)):
        ended = scripts.evaluate("--ckpt", str(tmp_path / "v2"), "--data", str(data), "--na-threshold", threshold, "--out",
                                 str(tmp_path / threshold))
        predictions = read(tmp_path / threshold, "predictions")
        assert sum(text == "" for text in predictions.values()) == refused and len(predictions) == 41
        assert ended.out.count("answer: (no answer)") == min(refused, 5)
    ended = scripts.evaluate("--ckpt", str(run_folder), "--data", str(data), "--na-threshold", "-1000", "--out",
                             str(tmp_path / "v1"))
    assert "" not in read(tmp_path / "v1", "predictions").values()
    assert ended.err.count("has not learnt to give no answer") == 1


def test_a_product_that_was_changed_is_told_and_damaged_weights_are_refused(run_folder, data_file, scripts, tmp_path):
    folder = shutil.copytree(run_folder / "model", tmp_path / "model")
    command = ["--ckpt", str(folder), "--data", str(data_file), *FP32, "--out", str(tmp_path / "out")]
    assert "changed since" not in scripts.evaluate(*command).err
    settings = read(folder, "qa")
    (folder / "qa.json").write_text(json.dumps(settings | {"max_answer_length": 3}))
    ended = scripts.evaluate(*command)
    assert "changed since the run wrote it" in ended.err and "qa.json" in ended.err
    assert read(tmp_path / "out", "conditions")["max_answer_length"] == 3
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    ended = scripts.evaluate(*command, status=2)
    assert "model.safetensors: damaged" in ended.last_line and ended.last_line.startswith("error: --ckpt")
