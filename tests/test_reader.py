"""`open_reader`, what a user imports: any model, and its answers.

One worked case: a tiny BERT, asked about "The bridge opened in 1846." with windows of 64 tokens, answers with a span of that
passage, the same that BertReader gives for the same weights.
"""

from __future__ import annotations

import pytest

from qa.bert.model import load_bert
from qa.bert.reader import BertReader
from qa.data.squad import load_squad, parse_squad
from qa.errors import UserError
from qa.prediction import Prediction
from qa.reader import open_reader
from qa.settings import resolve
from qa.training import distributed
from qa.training.precision import Precision
from qa.weights import load_tokenizer

LENGTHS = {"max_length": 64, "overlap": 16, "max_answer_length": 5}
PASSAGE = "The bridge opened in 1846."


def ask(reader) -> list[Prediction]:
    question = {"id": "q", "question": "When did the bridge open?", "answers": []}
    document = {"data": [{"title": "t", "paragraphs": [{"context": PASSAGE, "qas": [question]}]}]}
    return reader.answer(parse_squad(document, "typed")).predictions


def test_worked_case_bert(tiny_bert_folder):
    (prediction,) = ask(open_reader(str(tiny_bert_folder), seed=3, precision="fp32", **LENGTHS))
    assert prediction.text and all(PASSAGE[found.start_char:found.end_char] == found.text for found in prediction.candidates)
    distributed.reseed(3, 0, 0)
    model, _ = load_bert(tiny_bert_folder, 64)
    runtime = distributed.start()
    reader = BertReader(model, load_tokenizer(tiny_bert_folder), resolve("bert", LENGTHS, {})[0], Precision("fp32", "cpu"),
                        runtime, 4096)
    assert ask(reader) == [prediction]


def test_a_whole_data_set_is_answered_in_its_order(tiny_bert_folder, small_squad_file):
    data = load_squad(str(small_squad_file))
    answered = open_reader(str(tiny_bert_folder), precision="fp32", **LENGTHS).answer(data)
    assert [prediction.id for prediction in answered.predictions] == [example.id for example in data.examples]
    assert answered.conditions["windows"] >= len(data.examples)


def test_what_the_user_should_know_is_said(tiny_bert_folder, capsys):
    open_reader(str(tiny_bert_folder), precision="fp32", shots=2, prompt="engineered", **LENGTHS)
    told = capsys.readouterr().err
    assert "without a trained span head" in told and "--shots has no effect" in told and "--prompt has no effect" in told


@pytest.mark.parametrize("typed, words", [
    ({"decode": "exact"}, "--decode has no effect"), ({"max_length": 999}, "positions for"),
    ({"precision": "int3"}, "--precision int3"), ({"overlap": -1}, "--overlap -1"),
    ({"max_length": "64"}, "--max-length '64'"), ({"prompt": "enginered"}, "--prompt enginered: expected one of plain"),
    ({"num_best": 0}, "--num-best 0"), ({"data": "x"}, "no option 'data' for reading"), ({"foo": 1}, "no option 'foo'")])
def test_what_does_not_fit_is_refused(typed, words, tiny_bert_folder):
    with pytest.raises(UserError, match=words):
        open_reader(str(tiny_bert_folder), **LENGTHS | typed)
