"""The decoder against brute force: every pair of every window, in plain Python."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from qa.bert import decode
from qa.bert.decode import decode_flat
from qa.bert.spans import NonFiniteScores, _largest_numpy, _largest_torch, best_spans, largest, null_scores, sliding

KINDS = {  # ties everywhere; as a model gives them; far apart, so that exp underflows
    "integer": lambda rng, size: rng.integers(-2, 3, size).astype(np.float32),
    "normal": lambda rng, size: (4 * rng.standard_normal(size)).astype(np.float32),
    "extreme": lambda rng, size: rng.choice([-1e4, -50, 0, 3, 1e4], size).astype(np.float32),
    "fp64": lambda rng, size: 4 * rng.standard_normal(size),
}


def log_sum(scores: list[float]) -> float:
    highest = max(scores, default=-math.inf)
    return highest + math.log(math.fsum(math.exp(score - highest) for score in scores)) if scores else -math.inf


def all_spans(start, end, legal, max_answer_length) -> list[tuple]:
    """(minus score, start, end) of every legal span of one window; scores are summed in the scores' own precision."""
    return [(-float(start[s] + end[e]), s, e) for s in range(len(start)) if legal[s]
            for e in range(s, min(s + max_answer_length, len(start))) if legal[e]]


@pytest.mark.parametrize("kind", KINDS)
def test_best_spans_match_brute_force(kind):
    for seed in range(125):
        rng = np.random.default_rng([seed, *kind.encode()])
        num_questions, length, num_best, limit = (int(rng.integers(1, high)) for high in (4, 14, 12, 9))
        question = np.repeat(np.arange(num_questions), rng.integers(1, 4, num_questions))
        start, end = KINDS[kind](rng, (2, len(question), length))
        edges = np.sort(rng.integers(0, length + 1, (len(question), 2)), axis=1)  # some passages are empty
        legal = (np.arange(length) >= edges[:, :1]) & (np.arange(length) < edges[:, 1:])
        start[~legal], end[~legal] = rng.choice([np.nan, np.inf, 50.0], 2)  # must not be looked at
        table = best_spans(torch.tensor(start), torch.tensor(end), torch.tensor(legal), torch.tensor(question),
                           num_questions, num_best, limit)
        for index in range(num_questions):
            found = sorted((score, window, s, e) for window in np.flatnonzero(question == index)
                           for score, s, e in all_spans(start[window], end[window], legal[window], limit))
            valid = table.valid[index].tolist()
            assert valid == [rank < len(found) for rank in range(num_best)]
            columns = -table.score, table.window, table.start_token, table.end_token
            assert list(zip(*(column[index][valid].tolist() for column in columns), strict=True)) == found[:num_best]
            expected = log_sum([-score for score, *_ in found])
            assert table.log_normaliser[index].item() == pytest.approx(expected, rel=1e-6, abs=2e-6)


@dataclass
class Case:
    """Questions with overlapping windows in the flat arrays of windows.py."""

    start: np.ndarray
    end: np.ndarray
    arrays: dict
    num_best: int
    limit: int


def random_case(rng: np.random.Generator, kind: str, max_tokens: int = 14) -> Case:
    lengths, passages, questions, offsets, contexts = [], [], [], [], []
    for index in range(int(rng.integers(1, 5))):
        num_tokens = int(rng.integers(0, max_tokens))
        context = "".join(rng.choice(list("abc dé"), 2 * num_tokens + 1))
        edges = np.sort(rng.integers(0, len(context) + 1, (num_tokens, 2)), axis=0)  # tokens may share characters
        tokens = np.stack([edges[:, 0], np.maximum(edges[:, 0], edges[:, 1])], axis=1)
        capacity = int(rng.integers(3, 9))
        for begin in range(0, max(1, num_tokens - 2), capacity - 2):
            piece, head = tokens[begin:begin + capacity], int(rng.integers(1, 5))
            offsets.append(np.concatenate([np.zeros((head, 2)), piece, np.zeros((1, 2))]))
            lengths.append(head + len(piece) + 1)
            passages.append((head, head + len(piece)))
            questions.append(index)
        contexts.append(context)
    arrays = {"bounds": np.cumsum([0, *lengths]), "passage": np.array(passages, np.int32), "contexts": contexts,
              "offsets": np.concatenate(offsets).astype(np.int32), "question": np.array(questions, np.int32),
              "null_token": np.array([rng.integers(first) for first, _ in passages], np.int32)}
    start, end = KINDS[kind](rng, (2, sum(lengths)))
    return Case(start, end, arrays, int(rng.integers(1, 9)), int(rng.integers(1, 7)))


def brute_force(case: Case, use_null: bool) -> list[tuple]:
    """[(distinct spans as (start_char, end_char, score), log normaliser, null score)] of every question."""
    bounds, offsets, results = case.arrays["bounds"], case.arrays["offsets"], []
    for index in range(len(case.arrays["contexts"])):
        found, nulls = [], []
        for window in np.flatnonzero(case.arrays["question"] == index):
            cells = slice(bounds[window], bounds[window + 1])
            start, end = case.start[cells], case.end[cells]
            column, (first, last) = np.arange(len(start)), case.arrays["passage"][window]
            found += [(score, window, s, e) for score, s, e in
                      all_spans(start, end, (column >= first) & (column < last), case.limit)]
            null = case.arrays["null_token"][window]
            nulls.append(float(start[null] + end[null]))
        distinct = {}
        for score, window, s, e in sorted(found):
            distinct.setdefault((offsets[bounds[window] + s, 0], offsets[bounds[window] + e, 1]), -score)
        total = log_sum([-score for score, *_ in found] + ([min(nulls)] if use_null else []))
        results.append(([(*chars, score) for chars, score in distinct.items()], total, min(nulls)))
    return results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_cells, num_cases", [(1, 20), (300, 25), (decode.CHUNK_CELLS, 80)])
def test_decode_flat_matches_brute_force(kind, chunk_cells, num_cases, monkeypatch):
    monkeypatch.setattr(decode, "CHUNK_CELLS", chunk_cells)
    for seed in range(num_cases):
        rng = np.random.default_rng([seed, chunk_cells, *kind.encode()])
        case, use_null = random_case(rng, kind), bool(rng.integers(2))
        decoded = decode_flat(torch.tensor(case.start), torch.tensor(case.end), num_best=case.num_best,
                              max_answer_length=case.limit, use_null=use_null, **case.arrays)
        assert len(decoded) == len(case.arrays["contexts"])
        for answer, context, (spans, total, null) in zip(decoded, case.arrays["contexts"],
                                                         brute_force(case, use_null), strict=True):
            assert [(c.start_char, c.end_char, c.score) for c in answer.candidates] == spans[:case.num_best]
            assert [c.text for c in answer.candidates] == [context[s:e] for s, e, _ in spans[:case.num_best]]
            close = {"rel": 5e-3 if kind == "extreme" else 1e-5, "abs": 1e-30}  # at 2e4 fp32 is exact to 2e-3
            for candidate in answer.candidates:
                assert candidate.confidence == pytest.approx(math.exp(candidate.score - total), **close)
            if use_null:
                assert answer.null_score == null
                assert answer.null_confidence == pytest.approx(math.exp(null - total), **close)
                assert answer.no_answer_score == (null - spans[0][2] if spans else None)
            else:
                assert (answer.null_score, answer.null_confidence, answer.no_answer_score) == (None, None, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_to_fp32_before_scores_are_added(dtype):
    case = random_case(np.random.default_rng(7), "normal")
    start, end = torch.tensor(case.start).to(dtype), torch.tensor(case.end).to(dtype)
    options = {"num_best": 5, "max_answer_length": 4, **case.arrays}
    half, full = decode_flat(start, end, **options), decode_flat(start.float(), end.float(), **options)
    assert list(half) == list(full)


def single_window(num_tokens: int) -> dict:
    """One question, one window of two other tokens, then the passage; every token is one character."""
    characters = np.arange(num_tokens)
    offsets = np.concatenate([np.zeros((2, 2)), np.stack([characters, characters + 1], axis=1)]).astype(np.int32)
    return {"bounds": np.array([0, num_tokens + 2]), "passage": np.array([[2, num_tokens + 2]]), "offsets": offsets,
            "question": np.array([0]), "contexts": ["x" * num_tokens], "null_token": np.array([0])}


@pytest.mark.parametrize("use_null", [False, True])
def test_confidences_of_all_spans_and_no_answer_sum_to_one(use_null):
    rng = np.random.default_rng(3)
    start, end = torch.tensor(5 * rng.standard_normal((2, 42)))
    decoded = decode_flat(start, end, num_best=10_000, max_answer_length=11, use_null=use_null, **single_window(40))[0]
    assert len(decoded.candidates) == 40 * 11 - 10 * 11 // 2
    total = sum(candidate.confidence for candidate in decoded.candidates) + (decoded.null_confidence or 0)
    assert total == pytest.approx(1, abs=1e-12)


def test_ten_thousand_apart_neither_overflows_nor_loses_the_best():
    start, end = torch.zeros(2, 42)
    start[5], end[30] = 1e4, 1e4  # too far apart for a span of 11 tokens
    decoded = decode_flat(start, end, num_best=30, max_answer_length=11, **single_window(40))[0]
    assert [candidate.score for candidate in decoded.candidates] == [1e4] * 22 + [0] * 8
    confidences = [candidate.confidence for candidate in decoded.candidates]
    assert confidences == pytest.approx([1 / 22] * 22 + [0] * 8, abs=1e-3)


def test_ties_go_to_the_earliest_window_then_start_then_end():
    zeros = torch.zeros(2, 3)
    table = best_spans(zeros, zeros, torch.ones(2, 3, dtype=torch.bool), torch.tensor([0, 0]), 1, 12, 2)
    triples = zip(*(column[0].tolist() for column in (table.window, table.start_token, table.end_token)), strict=True)
    spans = [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)]
    assert list(triples)[:10] == [(window, *span) for window in (0, 1) for span in spans]
    assert table.valid[0].tolist() == [True] * 10 + [False] * 2


def test_the_best_pair_is_found_though_it_has_none_of_the_20_best_starts_and_ends():
    start, end = torch.full((2, 102), -9.0)
    start[-20:], end[2:22] = 9, 9  # each worth most, and with all that stands within its reach worth 0
    start[52], end[54] = 3, 3
    decoded = decode_flat(start, end, num_best=1, max_answer_length=30, **single_window(100))[0]
    assert [(c.start_char, c.end_char, c.score) for c in decoded.candidates] == [(50, 53, 6)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_scores_name_their_questions(bad):
    rng = np.random.default_rng(11)
    while True:
        case = random_case(rng, "normal", max_tokens=40)
        if len(case.arrays["contexts"]) == 4 and len(case.arrays["question"]) > 8 and (
                case.arrays["passage"][:, 1] > case.arrays["passage"][:, 0]).all():
            break
    options = {"num_best": 3, "max_answer_length": 4, **case.arrays}
    first, last = (int(np.flatnonzero(case.arrays["question"] == index)[-1]) for index in (1, 3))
    for window, array in ((first, case.start), (last, case.end)):
        array[case.arrays["bounds"][window] + case.arrays["passage"][window, 1] - 1] = bad
    with pytest.raises(NonFiniteScores) as error:
        decode_flat(torch.tensor(case.start), torch.tensor(case.end), **options)
    assert error.value.questions == [1, 3]

    table = torch.zeros(3, 4)
    table[2, 1] = bad
    legal, question = torch.tensor([[False, True, True, False]] * 3), torch.tensor([0, 1, 1])
    with pytest.raises(NonFiniteScores) as error:
        best_spans(torch.zeros(3, 4), table, legal, question, 2, 2, 2)
    assert error.value.questions == [1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_scores_matter_only_where_they_are_used(bad):
    rng = np.random.default_rng(12)
    case = random_case(rng, "normal")
    options = {"num_best": 3, "max_answer_length": 4, **case.arrays}
    clean = decode_flat(torch.tensor(case.start), torch.tensor(case.end), **options)
    nulls = case.arrays["bounds"][:-1] + case.arrays["null_token"]
    case.start[nulls] = bad
    ignored = decode_flat(torch.tensor(case.start), torch.tensor(case.end), **options)
    assert list(ignored) == list(clean)
    with pytest.raises(NonFiniteScores) as error:
        decode_flat(torch.tensor(case.start), torch.tensor(case.end), use_null=True, **options)
    assert error.value.questions == list(range(len(case.arrays["contexts"])))


def test_null_score_is_the_minimum_over_windows():
    scores = null_scores(torch.tensor([3.0, -1.0, 5.0, 2.0]), torch.tensor([0, 0, 1, 1]), 2)
    assert scores.tolist() == [-1, 2]


def test_no_question_at_all():
    empty = np.zeros(0, np.int32)
    decoded = decode_flat(torch.zeros(0), torch.zeros(0), bounds=np.zeros(1, np.int64), passage=empty.reshape(0, 2),
                          offsets=empty.reshape(0, 2), question=empty, contexts=[], num_best=3, max_answer_length=4)
    assert list(decoded) == []


def test_sliding_matches_a_loop():
    values = np.random.default_rng(5).integers(-9, 10, (3, 60))
    for count in range(1, 60):
        views = np.stack([values[:, i:i + 61 - count] for i in range(count)])
        assert torch.equal(sliding(torch.tensor(values), count, torch.add), torch.tensor(views.sum(axis=0)))
        assert torch.equal(sliding(torch.tensor(values), count, torch.maximum), torch.tensor(views.max(axis=0)))


def test_largest_takes_the_first_of_equal_values_on_every_device():
    rng = np.random.default_rng(6)
    for _ in range(200):
        values = rng.choice([-np.inf, 0, 1, 2], (4, int(rng.integers(1, 12)))).astype(np.float32)
        for k in range(1, values.shape[1] + 1):
            expected = np.sort(np.argsort(-values, axis=1, kind="stable")[:, :k], axis=1)
            assert np.array_equal(_largest_numpy(values, k), expected)  # a CPU's way
            assert np.array_equal(_largest_torch(torch.tensor(values), k), expected)  # that of other devices
    assert largest(torch.zeros(2, 3), 5).tolist() == [[0, 1, 2], [0, 1, 2]]
