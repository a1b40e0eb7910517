"""Files that are wrong in one place each: never a traceback, and every other question stays usable.

One worked case: the sound file has 5 questions, and `answer_start` of the first becomes "x". This answer's place is a text that
is no number, so 4 questions are usable. A file with this question alone cannot be trained on, and the error says why.
"""

from __future__ import annotations

import json
import math

import pytest
from transformers import AutoTokenizer

from qa.bert.windows import make_windows
from qa.data.splits import training_split
from qa.data.squad import load_squad
from qa.errors import UserError

MISSING = object()
VALUES = {"missing": MISSING, "null": None, "number": 7, "fraction": 2.5, "nan": math.nan, "infinite": math.inf,
          "huge": 10**400, "text": "x", "empty": "", "half a pair": "\ud83d", "list": [], "object": {}, "true": True,
          "nested": json.loads("[" * 100 + "]" * 100)}
ERROR = None
FIRST = ("data", 0, "paragraphs", 0, "qas", 0)
# place -> (usable questions, {value: another number}); counted by hand from what README says about such files
PLACES = {
    (): (ERROR, {}),
    ("data",): (ERROR, {}),
    ("version",): (5, {}),
    ("data", 0): (ERROR, {"missing": 2}),
    ("data", 0, "title"): (5, {}),
    ("data", 0, "paragraphs"): (ERROR, {"list": 2, "nested": 2}),
    ("data", 0, "paragraphs", 0): (2, {}),
    ("data", 0, "paragraphs", 0, "context"): (2, {}),
    ("data", 0, "paragraphs", 0, "qas"): (2, {}),
    FIRST: (4, {}),
    (*FIRST, "id"): (5, {}),
    (*FIRST, "question"): (4, {"text": 5, "half a pair": 5}),
    (*FIRST, "answers"): (4, {}),
    (*FIRST, "answers", 0): (4, {}),
    (*FIRST, "answers", 0, "text"): (4, {}),
    (*FIRST, "answers", 0, "answer_start"): (
        4, dict.fromkeys(("missing", "null", "number", "huge", "empty", "list", "object"), 5)),  # found at its one place
    (*FIRST, "is_impossible"): (4, {"missing": 5, "null": 5}),
}
CASES = [(place, name) for place in PLACES for name in VALUES if place or name != "missing"]


def question(number: int, text: str, context: str) -> dict:
    return {"id": f"q{number}", "question": f"Which one is number {number}?",
            "answers": [{"text": text, "answer_start": context.find(text)}], "is_impossible": None}


def sound() -> dict:
    """Two articles, with 3 and with 2 questions."""
    articles, number = [], 0
    for title, words in (("Birds", ["wren", "robin", "owl"]), ("Trees", ["ash", "elm"])):
        context = f"Here you may see: {', '.join(words)}."
        articles.append({"title": title, "paragraphs": [{"context": context, "qas": [
            question(number + index, word, context) for index, word in enumerate(words)]}]})
        number += len(words)
    return {"version": "1.1", "data": articles}


def changed(document: dict, place: tuple, value: object) -> object:
    if not place:
        return value
    *way, last = place
    parent = document
    for step in way:
        parent = parent[step]
    if value is MISSING:
        del parent[last]
    else:
        parent[last] = value
    return document


@pytest.fixture(scope="module")
def tokenizer(tiny_bert_folder):
    return AutoTokenizer.from_pretrained(tiny_bert_folder)


def read(path, tokenizer) -> int | None:
    """The usable questions, after all that a run does with the data; None: refused in one line."""
    try:
        data = load_squad(str(path))
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error) and len(str(error)) < 1500
        return None
    data.describe().encode("utf-8")
    usable = sum(example.trainable for example in data.examples)
    try:
        training_split(data, None, 0.0, seed=0)
        windows = make_windows(data.passages, tokenizer, 64, 16)
        assert windows.example_index.max() + 1 == len(data.examples) >= usable > 0
    except UserError as error:
        assert usable == 0 and all(line in str(error) for line in data.summary.lines()) and "\n" not in str(error)
    return usable


def test_worked_case(tokenizer, tmp_path):
    place, path = (*FIRST, "answers", 0, "answer_start"), tmp_path / "data.json"
    document = changed(sound(), place, "x")
    path.write_text(json.dumps(document))
    assert read(path, tokenizer) == 4
    document["data"][1:], document["data"][0]["paragraphs"][0]["qas"][1:] = [], []
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="no question that can be trained on.*; 1 × answer_start of the type str"):
        training_split(load_squad(str(path)), None, None, seed=0)


@pytest.mark.parametrize(("place", "name"), CASES, ids=lambda part: "-".join(map(str, part)) if part is tuple else None)
def test_one_wrong_place_costs_what_is_in_it_and_no_more(place, name, tokenizer, tmp_path):
    usable, exceptions = PLACES[place]
    (tmp_path / "data.json").write_text(json.dumps(changed(sound(), place, VALUES[name])))
    assert read(tmp_path / "data.json", tokenizer) == exceptions.get(name, usable)


@pytest.mark.parametrize("place", PLACES)
def test_a_thousand_brackets(place, tokenizer, tmp_path):
    """Whether they can be parsed depends on the version of Python."""
    text = json.dumps(changed(sound(), place, "HERE")).replace('"HERE"', "[" * 1000 + "]" * 1000)
    (tmp_path / "data.json").write_text(text)
    assert read(tmp_path / "data.json", tokenizer) in (None, PLACES[place][1].get("nested", PLACES[place][0]))


@pytest.mark.parametrize("share", range(0, 100, 4))
def test_a_file_that_is_cut_off_is_refused(share, tokenizer, tmp_path):
    content = json.dumps(sound()).encode()
    (tmp_path / "data.json").write_bytes(content[:len(content) * share // 100])
    assert read(tmp_path / "data.json", tokenizer) is None


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_encodings(encoding, tokenizer, tmp_path):
    """Those that JSON may have are read, another one is refused."""
    text = json.dumps(sound(), ensure_ascii=False).replace("Birds", "Vögel")
    (tmp_path / "data.json").write_bytes(text.encode(encoding))
    assert read(tmp_path / "data.json", tokenizer) == (None if encoding == "latin-1" else 5)


def test_every_error_about_data_tells_what_was_found(tmp_path):
    """An article that is no object after one with a skipped passage; articles to hold out, of which there is one."""
    document = changed(sound(), FIRST[:4], 3)
    for articles, share in (([*document["data"], 7], None), ([document["data"][0], {"title": "Birds", "paragraphs": sound()[
            "data"][1]["paragraphs"]}], 0.5)):
        (tmp_path / "data.json").write_text(json.dumps({"data": articles}))
        with pytest.raises(UserError, match="Found: 1 × passage without a text context"):
            training_split(load_squad(str(tmp_path / "data.json")), None, share, seed=0)
