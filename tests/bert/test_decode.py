"""The simple decoder by hand; the fast one against it, on random windows; what both promise.

One worked case, that of decode.py's docstring: the tokens "Ann", "met", "Bob" with the start scores 3, 0, 2 and the end scores
1, 0, 2. The best answers of at most two tokens are "Ann" (3 + 1) and "Bob" (2 + 2), and "Ann" is the earlier one.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qa.bert import decode_fast
from qa.bert.decode import decode_question
from qa.bert.decode_fast import _largest, _sliding, find_candidates, make_predictions
from qa.bert.reader import check_finite
from qa.bert.windows import Windows
from qa.data.squad import Example, Passage, SquadData, Summary
from qa.errors import UserError
from qa.prediction import Prediction

KINDS = {  # ties everywhere; as a model gives them; far apart, so that exp underflows
    "integer": lambda rng, size: rng.integers(-2, 3, size).astype(np.float32),
    "normal": lambda rng, size: (4 * rng.standard_normal(size)).astype(np.float32),
    "extreme": lambda rng, size: rng.choice([-1e4, -50, 0, 3, 1e4], size).astype(np.float32),
    "fp64": lambda rng, size: 4 * rng.standard_normal(size),
    "blanks": lambda rng, size: np.where(rng.random(size) < 0.4, -np.inf, 4 * rng.standard_normal(size)).astype(np.float32),
}


@dataclasses.dataclass
class Case:
    """Questions on a passage each, their windows, and the scores of every token."""

    data: SquadData
    windows: Windows
    start: np.ndarray
    end: np.ndarray

    def fast(self, num_best: int, max_answer_length: int, use_null: bool = False) -> list[Prediction]:
        start, end = torch.from_numpy(self.start), torch.from_numpy(self.end)
        found = find_candidates(start, end, self.windows, num_best, max_answer_length, use_null)
        return make_predictions(found, self.data)

    def plain(self, num_best: int, max_answer_length: int, use_null: bool = False) -> list[Prediction]:
        return [decode_question(self.start, self.end, self.windows, index, passage, passage.examples[0], num_best,
                                max_answer_length, use_null) for index, passage in enumerate(self.data.passages)]


BOTH = pytest.mark.parametrize("decode", [Case.plain, Case.fast], ids=["plain", "fast"])


def case(texts: list[str], parts: list[tuple], start: np.ndarray, end: np.ndarray) -> Case:
    """parts: (number of the text, tokens before the passage part, its offsets [P, 2]) of every window; one [SEP] ends it."""
    examples = [Example(str(number), "who?", (), (), False, True) for number in range(len(texts))]
    passages = [Passage("title", text, [example]) for text, example in zip(texts, examples, strict=True)]
    indices, befores, offsets = zip(*parts, strict=True)
    sizes = [len(part) for part in offsets]
    bounds = np.cumsum([0, *(before + size + 1 for before, size in zip(befores, sizes, strict=True))])
    passage_range = np.array([(before, before + size) for before, size in zip(befores, sizes, strict=True)], np.int32)
    all_offsets = np.zeros((bounds[-1], 2), np.int32)
    for first, before, part in zip(bounds[:-1], befores, offsets, strict=True):
        all_offsets[first + before:first + before + len(part)] = part
    labels = np.zeros(len(parts), np.int32)
    windows = Windows(np.zeros(bounds[-1], np.int32), all_offsets, bounds, passage_range, np.array(indices, np.int32), labels,
                      labels, 0, Summary())
    return Case(SquadData("random", passages, False, True, Summary()), windows, start, end)


def random_case(rng: np.random.Generator, kind: str, max_tokens: int = 14) -> Case:
    """Windows that overlap, tokens that share characters, passages without a token."""
    texts, parts = [], []
    for index in range(int(rng.integers(1, 5))):
        num_tokens = int(rng.integers(0, max_tokens))
        text = "".join(rng.choice(list("abc dé"), 2 * num_tokens + 1))
        edges = np.sort(rng.integers(0, len(text) + 1, (num_tokens, 2)), axis=0)
        tokens = np.stack([edges[:, 0], np.maximum(edges[:, 0], edges[:, 1])], axis=1)
        capacity = int(rng.integers(3, 9))
        parts += [(index, int(rng.integers(1, 5)), tokens[begin:begin + capacity])
                  for begin in range(0, max(1, num_tokens - 2), capacity - 2)]
        texts.append(text)
    return case(texts, parts, *KINDS[kind](rng, (2, sum(before + len(part) + 1 for _, before, part in parts))))


def one_window(start: np.ndarray, end: np.ndarray) -> Case:
    """One question, one window of [CLS] and [SEP], then the passage; every token is one character."""
    characters = np.arange(len(start) - 3)
    return case(["x" * len(characters)], [(0, 2, np.stack([characters, characters + 1], axis=1))], start, end)


def spans(prediction: Prediction) -> list[tuple[int, int, float]]:
    return [(candidate.start_char, candidate.end_char, candidate.score) for candidate in prediction.candidates]


# ---- by hand ---------------------------------------------------------------------------------------------------------

@BOTH
def test_worked_case(decode):
    """Tokens: [CLS] [SEP] Ann met Bob [SEP]."""
    offsets = np.array([(0, 3), (4, 7), (8, 11)])
    ann = case(["Ann met Bob"], [(0, 2, offsets)], np.float32([1, 9, 3, 0, 2, 9]), np.float32([0.5, 9, 1, 0, 2, 9]))
    (found,) = decode(ann, 4, 2, True)
    assert found.id == "0" and found.text == "Ann" and found.null_score == 1.5 and found.no_answer_score == 1.5 - 4
    assert [(candidate.text, candidate.score) for candidate in found.candidates] == [
        ("Ann", 4), ("Bob", 4), ("Ann met", 3), ("met Bob", 2)]
    total = 2 * math.exp(4) + math.exp(3) + math.exp(2) + math.exp(0) + math.exp(1.5)  # "met" is the fifth span
    assert [candidate.confidence for candidate in found.candidates] == pytest.approx(
        [math.exp(score) / total for score in (4, 4, 3, 2)], rel=1e-6)
    assert found.null_confidence == pytest.approx(math.exp(1.5) / total, rel=1e-6)


@BOTH
def test_windows_are_joined_and_equal_characters_count_once_with_the_best_confidence(decode):
    """Windows [CLS] a b [SEP] and [CLS] b c [SEP], answers of one token: b is found at 3 and at 5."""
    a, b, c = (0, 1), (1, 2), (2, 3)
    joined = case(["abc"], [(0, 1, np.array([a, b])), (0, 1, np.array([b, c]))],
                  np.float32([1, 2, 3, 0, -1, 5, 4, 0]), np.zeros(8, np.float32))
    (found,) = decode(joined, 9, 1, True)
    assert spans(found) == [(1, 2, 5), (2, 3, 4), (0, 1, 2)]
    assert found.null_score == -1  # of 1 and -1
    total = sum(math.exp(score) for score in (2, 3, 5, 4, -1))
    assert found.candidates[0].confidence == pytest.approx(math.exp(5) / total, rel=1e-6)


@BOTH
def test_ties_go_to_the_earliest_window_then_start_then_end(decode):
    zeros = np.zeros(10, np.float32)
    three = np.array([(0, 1), (1, 2), (2, 3)])
    ties = case(["abcdef"], [(0, 1, three), (0, 1, three + 3)], zeros, zeros)
    found = [(start, end) for start, end, _ in spans(decode(ties, 10, 2)[0])]
    first = [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]
    assert found == first + [(start + 3, end + 3) for start, end in first]


# ---- the fast decoder against the simple one -------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_cells, num_cases", [(1, 20), (300, 25), (decode_fast.CHUNK_CELLS, 80)])
def test_fast_equals_plain(kind, chunk_cells, num_cases, monkeypatch):
    monkeypatch.setattr(decode_fast, "CHUNK_CELLS", chunk_cells)
    for seed in range(num_cases):
        rng = np.random.default_rng([seed, chunk_cells, *kind.encode()])
        random, use_null = random_case(rng, kind), bool(rng.integers(2))
        if kind == "blanks":  # [CLS] is none
            random.start[random.windows.bounds[:-1]] = random.end[random.windows.bounds[:-1]] = 1
        options = int(rng.integers(1, 12)), int(rng.integers(1, 9)), use_null
        close = {"rel": 5e-3 if kind == "extreme" else 1e-5, "abs": 1e-30}  # at 2e4 fp32 is exact to 2e-3
        for fast, plain in zip(random.fast(*options), random.plain(*options), strict=True):
            for one, other in zip(fast.candidates, plain.candidates, strict=True):
                assert one.confidence == pytest.approx(other.confidence, **close)
                one.confidence = other.confidence
            if use_null:
                assert fast.null_confidence == pytest.approx(plain.null_confidence, **close)
                fast.null_confidence = plain.null_confidence
            assert fast == plain  # all else to the bit


def test_the_best_pair_is_found_though_it_has_none_of_the_20_best_starts_and_ends():
    start, end = np.full((2, 103), -9.0, np.float32)
    start[-21:-1], end[2:22] = 9, 9  # the largest scores; but with each partner that is near enough they sum to 0
    start[52], end[54] = 3, 3
    assert spans(one_window(start, end).fast(1, 30)[0]) == [(50, 53, 6)]


# ---- confidences -----------------------------------------------------------------------------------------------------

@BOTH
@pytest.mark.parametrize("use_null", [False, True])
def test_confidences_of_all_spans_and_no_answer_sum_to_one(decode, use_null):
    start, end = 5 * np.random.default_rng(3).standard_normal((2, 43))
    (found,) = decode(one_window(start, end), 10_000, 11, use_null)
    assert len(found.candidates) == 40 * 11 - 10 * 11 // 2
    total = sum(candidate.confidence for candidate in found.candidates) + (found.null_confidence or 0)
    assert total == pytest.approx(1, abs=1e-12)


@BOTH
def test_ten_thousand_apart_neither_overflows_nor_loses_the_best(decode):
    start, end = np.zeros((2, 43), np.float32)
    start[5], end[30] = 1e4, 1e4  # too far apart for a span of 11 tokens
    (found,) = decode(one_window(start, end), 30, 11)
    assert [candidate.score for candidate in found.candidates] == [1e4] * 22 + [0] * 8
    assert [candidate.confidence for candidate in found.candidates] == pytest.approx([1 / 22] * 22 + [0] * 8, abs=1e-3)


# ---- scores that are no numbers --------------------------------------------------------------------------------------

@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_scores_name_the_first_question(bad):
    three = np.array([(0, 1), (1, 2), (2, 3)])
    scores = torch.zeros(20)
    windows = case(["abc"] * 3, [(0, 1, three), (1, 1, three), (1, 1, three), (2, 1, three)], *np.zeros((2, 20))).windows
    data = SimpleNamespace(examples=[SimpleNamespace(id=name) for name in ("first", "second", "third")])
    check_finite(scores, windows, data)
    scores[[12, 15]] = bad  # of the third and the last window
    with pytest.raises(UserError, match="NaN or infinite for 2 questions, the first being 'second'"):
        check_finite(scores, windows, data)


# ---- parts of the fast decoder ---------------------------------------------------------------------------------------

def test_sliding_matches_a_loop():
    values = np.random.default_rng(5).integers(-9, 10, (3, 60))
    for count in range(1, 60):
        views = np.stack([values[:, i:i + 61 - count] for i in range(count)])
        assert torch.equal(_sliding(torch.tensor(values), count, torch.add), torch.tensor(views.sum(axis=0)))
        assert torch.equal(_sliding(torch.tensor(values), count, torch.maximum), torch.tensor(views.max(axis=0)))


def test_largest_takes_the_first_of_equal_values():
    rng = np.random.default_rng(6)
    for _ in range(200):
        values = rng.choice([-np.inf, 0, 1, 2], (4, int(rng.integers(1, 12)))).astype(np.float32)
        for count in range(1, values.shape[1] + 1):
            expected = np.sort(np.argsort(-values, axis=1, kind="stable")[:, :count], axis=1)
            assert np.array_equal(_largest(torch.tensor(values), count), expected)
    assert _largest(torch.zeros(2, 3), 5).tolist() == [[0, 1, 2], [0, 1, 2]]
