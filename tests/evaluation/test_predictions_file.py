"""Predictions files: what is read, and one clear line for everything else."""

import json
import os
from pathlib import Path

import pytest

from qa.data.squad import SquadData, load_squad, parse_squad
from qa.errors import UserError
from qa.evaluation.predictions_file import load_na_probs, load_predictions


def make_data(*ids: str, is_v2: bool = False) -> SquadData:
    answer = [{"text": "cat", "answer_start": 4}]
    qas = [{"id": question_id, "question": "Who sat?", "answers": answer} for question_id in ids]
    article = {"title": "t", "paragraphs": [{"context": "The cat sat.", "qas": qas}]}
    return parse_squad({"version": "v2.0" if is_v2 else "1.1", "data": [article]}, "dev.json")


def write(folder: Path, content: object) -> Path:
    path = folder / "predictions.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def message(load, path: Path, data: SquadData) -> str:
    with pytest.raises(UserError) as caught:
        load(path, data)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    return str(caught.value)


def test_predictions_come_back_as_written(tmp_path):
    predictions = {"1": " The cát\n", "2": "", "other": "x"}
    assert load_predictions(write(tmp_path, predictions), make_data("1", "2", "3", is_v2=True)) == predictions
    with_mark = b"\xef\xbb\xbf" + json.dumps(predictions).encode()
    assert load_predictions(write(tmp_path, with_mark), make_data("1", is_v2=True)) == predictions


def test_half_a_surrogate_pair_in_an_id_is_replaced_as_in_the_data(tmp_path):
    half = json.loads('"\\ud83d"')
    data = make_data(f"1{half}")
    assert load_predictions(write(tmp_path, {f"1{half}": "cat"}), data) == {data.examples[0].id: "cat"}


def test_scores_come_back_as_floats(tmp_path):
    scores = load_na_probs(write(tmp_path, {"1": -3, "2": 0.25, "other": 1e9}), make_data("1", "2", "3"))
    assert scores == {"1": -3.0, "2": 0.25, "other": 1e9}
    assert all(isinstance(score, float) for score in scores.values())


@pytest.mark.parametrize("load", [load_predictions, load_na_probs])
@pytest.mark.parametrize("content, found", [
    (b"", "empty"), (b" \n", "empty"),
    (b"id,answer", "not JSON"), (b"\xff\xfe{", "not JSON"), (b'{"1": ', "not JSON"),
    ([{"id": "1", "prediction_text": "cat"}], '[{"id": "1"'), (b"null", "null"), ("cat", '"cat"'),
    ({}, "0 of its 0 ids"), ({"1": None}, "null"), ({"1": ["cat"]}, '["cat"]'), ({"1": True}, "true"),
    (b'{"1": ' + b"[" * 9000 + b"]" * 9000 + b"}", "not JSON"), (b'{"1": ' + b"[" * 400 + b"]" * 400 + b"}", "[[["),
    ({"a\nb": {"text": "x" * 100}}, '"a\\nb" is {"text": "xx'),
])
def test_other_forms_are_one_line_errors(tmp_path, load, content, found):
    assert found in message(load, write(tmp_path, content), make_data("1"))


@pytest.mark.parametrize("load, value", [(load_predictions, "cat"), (load_na_probs, 0.5)])
def test_an_id_of_several_questions_is_refused_with_what_to_write(tmp_path, load, value):
    """One prediction for both would be wrong for one of them, silently."""
    articles = [{"title": title, "paragraphs": [{"context": "The cat sat.", "qas": [{"id": 0, "question": "Who sat?"}]}]}
                for title in ("a", "b")]
    articles[1]["paragraphs"][0]["context"] += " It slept."
    data = parse_squad({"version": "v2.0", "data": articles}, "dev.json")
    said = message(load, write(tmp_path, {"0": value, "b/0": value}), data)
    assert '"0"' in said and "several questions" in said and "title/id" in said
    assert load(write(tmp_path, {"a/0": value, "b/0": value}), data) == {"a/0": value, "b/0": value}


@pytest.mark.parametrize("load", [load_predictions, load_na_probs])
def test_unreadable_files_are_one_line_errors(tmp_path, load):
    assert "No such file" in message(load, tmp_path / "none.json", make_data("1"))
    assert "directory" in message(load, tmp_path, make_data("1"))


@pytest.mark.parametrize("score", ["0.5", "NaN", "Infinity", "1e999", "1" + "0" * 400])
def test_scores_that_are_not_finite_numbers_are_errors(tmp_path, score):
    content = b'{"1": "0.5"}' if score == "0.5" else f'{{"1": {score}}}'.encode()
    assert "finite number" in message(load_na_probs, write(tmp_path, content), make_data("1"))


@pytest.mark.parametrize("load, value", [(load_predictions, "cat"), (load_na_probs, 0.5)])
def test_a_file_for_other_data_is_an_error(tmp_path, load, value):
    text = message(load, write(tmp_path, {"x": value, "y": value}), make_data("1", "2", "3"))
    assert "0 of its 2 ids" in text and '"x"' in text and "3 of dev.json" in text and '"1"' in text


def test_v2_predictions_for_v1_data_are_an_error(tmp_path):
    path = write(tmp_path, {"1": "cat", "2": "", "unanswerable": ""})
    text = message(load_predictions, path, make_data("1", "2"))
    assert '2 are ""' in text and "1 of 3 ids" in text and "v2.0 data" in text
    assert len(load_predictions(path, make_data("1", "2", is_v2=True))) == 3


def test_a_v1_system_may_leave_a_question_unanswered(tmp_path):
    assert load_predictions(write(tmp_path, {"1": "cat", "2": ""}), make_data("1", "2", "3"))["2"] == ""


@pytest.mark.squad
@pytest.mark.skipif("SQUAD_DIR" not in os.environ, reason="SQUAD_DIR is not set")
def test_published_predictions_load_for_their_own_data_only():
    folder = Path(os.environ.get("SQUAD_DIR", ""))
    v1, v2 = (load_squad(str(folder / f"squad/dev-v{version}.json"), "dev") for version in ("1.1", "2.0"))
    for name in ("r-net-v1.1", "logistic-v1.1"):
        assert len(load_predictions(folder / f"scoring/{name}.json", v1)) >= 1491
    for name in ("bidaf-v2.0", "nlnet-v2.0"):
        assert len(load_predictions(folder / f"scoring/{name}.json", v2)) == 1344
        assert len(load_na_probs(folder / f"scoring/{name}-na.json", v2)) == 1344
        assert "v2.0 data" in message(load_predictions, folder / f"scoring/{name}.json", v1)
