"""A question's fields are read in every usual shape, to the same values; of another type they are refused by its name.

    {"text": ["1846"], "answer_start": ["29"]}   the hub's form  ->  Claim("1846", 29)
"""

import itertools
import json

import pytest

from qa.data.fields import Claim, read_question

SENTENCE = "The bridge opened in 1846."
WHOLE_NUMBERS = [29, 29.0, "29", " 29 ", "29.0"]
ONE, TWO = Claim("1846", 29), Claim("in 1846", 26)


def read(answers=None, is_impossible=None):
    asked = {"id": "q", "question": "When?", "answers": answers, "is_impossible": is_impossible}
    return read_question(json.loads(json.dumps(asked)))


@pytest.mark.parametrize("start", WHOLE_NUMBERS)
def test_every_shape_of_an_answer_is_the_same_claim(start):
    answer, hub = {"text": "1846", "answer_start": start}, {"text": ["1846"], "answer_start": [start]}
    for shape in ([answer], answer, hub, [hub], {**answer, "text": ["1846"]}, [None, answer], {**hub, "answer_end": [33]}):
        asked = read(shape)
        assert asked.claims == [ONE] and asked.faults == [] and type(asked.claims[0].start_char) is int


def test_several_answers_keep_their_order():
    first, second = ({"text": claim.text, "answer_start": claim.start_char} for claim in (ONE, TWO))
    for shape in ([first, second], {"text": ["1846", "in 1846"], "answer_start": [29, 26]},
                  [{key: [value] for key, value in answer.items()} for answer in (first, second)]):
        assert read(shape).claims == [ONE, TWO]


def test_texts_without_places_are_claims_without_one():
    for shape in ({"text": ["1846", "in 1846"], "answer_start": [29]},
                  [{"text": "1846", "answer_start": 29}, {"text": "in 1846"}]):
        assert read(shape).claims == [ONE, Claim("in 1846", None)] and read(shape).faults == []


@pytest.mark.parametrize("answers", [None, [], {}, "", [None], [{}], {"text": [], "answer_start": []}, {"text": None},
                                     [{"text": "", "answer_start": -1}], {"text": ["  "], "answer_start": [0]}])
def test_every_way_to_give_no_answer_is_none(answers):
    assert read(answers).answers() == [] and read(answers).faults == []


@pytest.mark.parametrize("flag, spellings", [(True, [True, "True", "true", " TRUE", 1, 1.0, "1"]),
                                             (False, [False, "False", "false", 0, 0.0, "0"])])
def test_every_spelling_of_the_flag_is_read(flag, spellings):
    for spelling in spellings:
        assert read(is_impossible=spelling).is_impossible is flag and read(is_impossible=spelling).faults == []
    assert read().is_impossible is None


NOT_NUMBERS = {"list": [[29]], "dict": {"a": 1}, "bool": True, "str": "twenty", "float": 29.5}


def test_other_types_are_faults_that_name_the_type():
    for name, value in NOT_NUMBERS.items():
        assert read([{"text": "1846", "answer_start": value}]).faults == [
            f"answer_start of the type {name} that is no whole number"]
    for name, value in {"list": [0], "dict": {"a": 1}, "str": "maybe", "int": 2, "float": 0.5}.items():
        asked = read(is_impossible=value)
        assert asked.is_impossible is None
        assert asked.faults == [f"is_impossible of the type {name} that is neither true nor false"]
    for name, value in {"str": SENTENCE, "int": 5, "float": 0.5, "bool": True}.items():
        assert read(value).faults == [f"answer of the type {name}"] == read([value]).faults
    assert read([[SENTENCE]]).faults == ["answer of the type list"]
    assert read([{"answer_start": 29}]).faults == ["answer without the field text"]
    assert read({"text": [1846, {}], "answer_start": 29}).faults == [
        "answer whose text is of the type int", "answer whose text is of the type dict"]


def test_no_value_of_json_is_an_exception():
    """Every pair of odd values, in every place: read or refused."""
    odd = [None, True, 0, -1, 10**30, 0.5, 1e300, float("nan"), float("inf"), "", "x", "9" * 5000, [], [[]], [None], {},
           {"text": []}, {"text": {}}, [{"text": [[]], "answer_start": {}}]]
    for value, other in itertools.product(odd, odd):
        for answers in (value, [value, other], {"text": value, "answer_start": other},
                        [{"text": [value], "answer_start": [other]}]):
            asked = read_question({"id": value, "question": "When?", "answers": answers, "is_impossible": other})
            assert all(isinstance(claim.text, str) and (claim.start_char is None or type(claim.start_char) is int)
                       for claim in asked.claims)
