"""Questions to passages, from Python, with both families; and the order of answers over many passages.

One worked case, of `rank_answers`: passage 0 says "1844" with score 2 and null score 5, passage 1 "1901" with score 1 and null
score 0. Passage 0 has the higher score, but it gives its answer less than no answer: the evidence is -3 against 1, and
"1901" comes first.
"""

from __future__ import annotations

import dataclasses
import warnings

import pytest

from qa.asking import Reply, rank_answers
from qa.bert.reader import BertReader
from qa.data.squad import load_squad
from qa.errors import UserError
from qa.prediction import Candidate
from qa.reader import open_reader

LENGTHS = {"max_length": 64, "overlap": 16, "max_answer_length": 5}
PASSAGES = ["The bridge opened in 1846 in Cork.", "The tower of Bern, built by Anna, fell in 1901."]


def answer(text: str, score: float, start: int = 0, confidence: float = 0.5) -> Candidate:
    return Candidate(text, start, start + len(text), score, confidence)


def test_worked_case_of_the_order():
    replies = [Reply("?", [answer("1844", 2.0)], False, None, 5.0), Reply("?", [answer("1901", 1.0)], False, None, 0.0)]
    assert [(one.answer.text, one.passage, one.evidence, one.no_answer) for one in rank_answers(replies, 5)] == [
        ("1901", 1, 1.0, False), ("1844", 0, -3.0, False)]
    assert len(rank_answers(replies, 1)) == 1


def test_an_answer_inside_a_better_one_of_its_passage_is_left_out():
    of_passage_0 = [answer("in 1844", 3.0), answer("1844", 2.0, start=3), answer("Ann", 1.0, start=20)]
    replies = [Reply("?", of_passage_0, False, None, 0.0), Reply("?", [answer("in 1844", 2.5)], False, None, 0.0)]
    assert [(one.answer.text, one.passage) for one in rank_answers(replies, 5)] == [("in 1844", 0), ("in 1844", 1), ("Ann", 0)]


def test_a_passage_that_refuses_is_left_out_unless_all_refuse():
    refusing = Reply("?", [answer("a", 9.0)], True, 0.9, 1.0)
    assert [one.answer.text for one in rank_answers([refusing, Reply("?", [answer("b", 1.0)], False, 0.1, 0.5)], 5)] == ["b"]
    (only,) = rank_answers([refusing], 5)
    assert only.answer.text == "a" and only.no_answer


@pytest.fixture(params=["bert", "llama"])
def reader(request, tiny_bert_folder):
    if request.param == "bert":
        return open_reader(str(tiny_bert_folder), precision="fp32", seed=3, **LENGTHS)
    folder = request.getfixturevalue("tiny_llama_folder")
    return open_reader(str(folder), precision="fp32", prompt="plain", decode="exact", max_length=256, overlap=16,
                       max_answer_length=6)


def test_an_answer_is_where_it_says(reader):
    reply = reader.ask("When did the bridge open?", PASSAGES[0])
    assert reply.question == "When did the bridge open?" and 1 <= len(reply.answers) <= 3
    assert not reply.no_answer and reply.no_answer_confidence is None
    for found in reply.answers:
        assert PASSAGES[0][found.start_char:found.end_char] == found.text and 0 < found.confidence < 1


def test_many_at_once_are_as_one_by_one_and_lists_go_with_single_strings(reader):
    questions = ["When did the bridge open?", "Who built the tower?"]
    one_by_one = [[reader.ask(question, passage) for passage in PASSAGES] for question in questions]
    assert texts(reader.ask(questions[0], PASSAGES)) == texts(one_by_one[0])
    assert texts(reader.ask(questions, PASSAGES[1])) == texts([row[1] for row in one_by_one])
    assert texts(reader.ask(questions, PASSAGES)) == texts([one_by_one[0][0], one_by_one[1][1]])
    for reply, alone in zip(reader.ask(questions[0], PASSAGES), one_by_one[0], strict=True):
        assert [one.confidence for one in reply.answers] == pytest.approx([one.confidence for one in alone.answers], abs=1e-4)


def test_passages_may_be_one_string_and_num_best_is_at_least_1(reader):
    assert [one.passage for one in reader.find("Who?", PASSAGES[0], num_best=1)] == [0] and reader.find("Who?", []) == []
    for ask in (reader.ask, reader.find):
        with pytest.raises(UserError, match="num_best 0: expected at least 1"):
            ask("Who?", PASSAGES[0], num_best=0)


def texts(replies: list[Reply]) -> list[list[tuple[str, int]]]:
    return [[(one.text, one.start_char) for one in reply.answers] for reply in replies]


def test_ask_says_what_answer_says_of_a_data_set(reader, small_squad_file):
    data = load_squad(str(small_squad_file))
    data.passages = data.passages[:2]
    pairs = [(example.question, passage.text) for passage in data.passages for example in passage.examples]
    settings = dataclasses.replace(reader.settings, num_best=3)
    expected = dataclasses.replace(reader, settings=settings).answer(data).predictions
    replies = reader.ask([question for question, _ in pairs], [text for _, text in pairs])
    assert [reply.answers for reply in replies] == [prediction.candidates for prediction in expected]  # to the bit


def test_a_passage_and_a_question_asked_twice_are_read_once(reader, monkeypatch):
    seen, answer_all = [], type(reader).answer
    monkeypatch.setattr(type(reader), "answer", lambda self, data: seen.append(data) or answer_all(self, data))
    replies = reader.ask(["Who?", "When?", "Who?"], [PASSAGES[0], PASSAGES[0], PASSAGES[0]])
    (data,) = seen
    assert len(data.passages) == 1 and len(data.examples) == 2 and replies[0] == replies[2]


def test_berts_evidence_is_the_same_where_it_may_not_refuse(reader):
    """Its null score ranks passages after training on v1.1 too. A LLaMA's evidence is then log P(answer) alone."""
    free, bound = (reader.ask("Who?", PASSAGES[0], may_refuse=may_refuse) for may_refuse in (True, False))
    expected = free.evidence(free.answers[0]) if isinstance(reader, BertReader) else bound.answers[0].score
    assert bound.evidence(bound.answers[0]) == pytest.approx(expected) and bound.no_answer_confidence is None


@pytest.mark.parametrize("threshold, refused", [(-1000.0, True), (1000.0, False)])
def test_no_answer_wins_above_the_threshold(reader, threshold, refused):
    reader.settings = dataclasses.replace(reader.settings, na_threshold=threshold)
    reply = reader.ask("Who?", PASSAGES[0], may_refuse=True)
    assert reply.no_answer is refused and 0 < reply.no_answer_confidence < 1 and reply.answers
    assert reply.evidence(reply.answers[0]) == pytest.approx(reply.answers[0].score - reply.null_score)
    assert not reader.ask("Who?", PASSAGES[0]).no_answer  # this model has not learnt it
    reader.settings = dataclasses.replace(reader.settings, is_v2=True)
    assert reader.ask("Who?", PASSAGES[0]).no_answer is refused
    assert not reader.ask("Who?", PASSAGES[0], may_refuse=False).no_answer


def test_the_temperature_of_the_settings_is_used(reader):
    plain = reader.ask("Who?", PASSAGES[0]).answers[0].confidence
    reader.settings = dataclasses.replace(reader.settings, temperature=2.0)
    odds = (plain / (1 - plain)) ** 0.5
    assert reader.ask("Who?", PASSAGES[0]).answers[0].confidence == pytest.approx(odds / (1 + odds))


@pytest.mark.parametrize("question, passage, words", [
    ("", "text", "a question is ''"), (" \n", "text", "a question is"), ("Who?", "  ", "a passage is"),
    (None, "text", "question"), (["Who?"], ["a", "b"], "1 questions and 2 passages"),
    ("Who " * 500, "text", "expected at most"), ([], [], None)])
def test_what_cannot_be_asked_is_refused_in_one_line(reader, question, passage, words):
    if words is None:
        assert reader.ask(question, passage) == []
        return
    with pytest.raises(UserError, match=words) as error:
        reader.ask(question, passage)
    assert "\n" not in str(error.value)


def test_what_was_cut_is_said_once(tiny_bert_folder):
    reader = open_reader(str(tiny_bert_folder), precision="fp32", **LENGTHS)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):
            reader.ask("Who?", "жук " * 20)
    assert len(told) == 1 and "unknown tokens" in str(told[0].message)
