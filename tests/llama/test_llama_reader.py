"""From examples to predictions by both decoders: spans, offsets, scores, and what is printed."""

from __future__ import annotations

import math

import pytest
import torch

import qa.llama.reader as reader_module
from qa.data.squad import parse_squad
from qa.evaluation.results import result_files
from qa.evaluation.scoring import score_predictions
from qa.llama.greedy import Generation
from qa.llama.prompt import PromptTemplate
from qa.llama.reader import LlamaReader
from qa.settings import ReadSettings
from qa.training.distributed import Runtime
from qa.training.precision import Precision

ALONE = Runtime(0, 1, torch.device("cpu"))


def reader(model, template, **more) -> LlamaReader:
    settings = ReadSettings(**{"max_length": 480, "overlap": 20, "max_answer_length": 10, "num_best": 1} | more)
    return LlamaReader(model, template, settings, Precision("fp32", "cpu"), ALONE, micro_tokens=4096)


def predict(model, tokenizer, data, **more):
    answered = reader(model, PromptTemplate(tokenizer, "plain", data.is_v2), **more).answer(data)
    return answered.predictions, [*answered.notes, *answered.work]


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request):
    return request.getfixturevalue(f"{request.param}_tokenizer")


def few(document, num_articles=1):
    return parse_squad({**document, "data": document["data"][:num_articles]}, "small")


def test_exact_answers_are_spans_of_the_passage(tiny_llama, tokenizer, small_squad):
    data = few(small_squad)
    predictions, notes = predict(tiny_llama, tokenizer, data, decode="exact", num_best=3)
    questions = [(passage.text, example) for passage in data.passages for example in passage.examples]
    for (passage, example), prediction in zip(questions, predictions, strict=True):
        assert prediction.id == example.id and prediction.raw_text is prediction.grounding is None  # nothing was generated
        assert prediction.text == prediction.candidates[0].text != ""
        assert len(prediction.candidates) == 3
        scores = [candidate.score for candidate in prediction.candidates]
        assert scores == sorted(scores, reverse=True)
        for candidate in prediction.candidates:
            assert passage[candidate.start_char : candidate.end_char] == candidate.text
            assert candidate.confidence == pytest.approx(math.exp(candidate.score))
    assert any(note.startswith("exact search") and "all proven" in note for note in notes)
    assert any(note.startswith("ceiling of exact decoding") for note in notes)
    metrics = score_predictions(data, predictions, None)
    assert set(metrics) == {"exact_match", "f1", "total", "ece", "coverage_area"}
    nbest = result_files(data, predictions, None)["nbest.json"]
    assert [len(entries) for entries in nbest.values()] == [3] * len(predictions)


@pytest.mark.parametrize("decode", ["greedy", "exact"])
def test_no_answer_score_is_the_log_odds_of_the_refusal(tiny_llama, tokenizer, small_squad_v2, decode):
    data = few(small_squad_v2)
    predictions, _ = predict(tiny_llama, tokenizer, data, decode=decode)
    for prediction in predictions:
        p = prediction.null_confidence
        assert 0 < p < 1 and prediction.no_answer_score == pytest.approx(math.log(p) - math.log1p(-p), abs=1e-5)
    for entries in result_files(data, predictions, 0.0)["nbest.json"].values():
        (refusal,) = [entry for entry in entries if entry["start_char"] is None]
        assert refusal["score"] == pytest.approx(math.log(refusal["confidence"]))
        assert entries == sorted(entries, key=lambda entry: -entry["score"])


def test_greedy_answers_leave_what_was_written(tiny_llama, tokenizer, small_squad):
    data = few(small_squad)
    predictions, _ = predict(tiny_llama, tokenizer, data)
    generated = result_files(data, predictions, None)["generated.json"]
    assert generated == {p.id: {"text": p.raw_text, "grounding": p.grounding} for p in predictions}


def test_a_refusal_that_was_learnt_is_known_on_data_of_v1_too(tiny_llama, tokenizer, small_squad, monkeypatch):
    """Not grounded as if it were an answer."""
    data = few(small_squad)
    template = PromptTemplate(tokenizer, "plain", is_v2=True)
    assert template.for_data(False) is template.for_data(True) is template
    plain = PromptTemplate(tokenizer, "plain")
    assert plain.for_data(False) is plain and plain.for_data(True).settings() == plain.settings() | {"is_v2": True}

    def generate(model, template, prompts, *_):
        return [Generation(prompt, text=template.refusal, log_prob=-0.5, is_complete=True) for prompt in prompts]

    monkeypatch.setattr(reader_module, "generate", generate)
    predictions = reader(tiny_llama, template).answer(data).predictions
    assert {(p.text, p.grounding) for p in predictions} == {("", "refused")}
    assert score_predictions(data, predictions, None)["num_refused"] == len(predictions)


def test_a_budget_is_reported(tiny_llama, tokenizer, small_squad):
    data = few(small_squad)
    _, notes = predict(tiny_llama, tokenizer, data, decode="exact", num_best=20, max_expansions=1)
    assert any(f"{len(data.examples)} of {len(data.examples)} not proven, the largest gap" in note for note in notes)
