"""The plain search, a dict in the model's place: worked by hand, and against brute force over all candidates."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from qa.llama.candidates import Trie, row_of_one
from qa.llama.encode import Piece, Prompt
from qa.llama.search import Extraction, Span, Step, best_first, describe_work, join_pieces
from qa.llama.units import SMALL_UNITS, cut


def make_trie(candidates: list[tuple[int, ...]]) -> Trie:
    """Of these tokens. Where they are in a passage does not matter to the search."""
    return Trie([row_of_one(list(ids), 0, 0) for ids in candidates], cut("x", SMALL_UNITS))


def test_a_search_of_three_candidates():
    """P("The") = 0.5 * 0.1, P("The tower") = 0.5 * 0.8 * 0.9 = 0.36, P("1889") = 0.3 * 0.5 = 0.15. "1889" is never run."""
    the, tower, year = 7, 8, 9
    trie = make_trie([(the,), (the, tower), (year,)])
    table = {(): {the: 0.5, year: 0.3, "end": 0.2}, (the,): {tower: 0.8, "end": 0.1}, (the, tower): {"end": 0.9}}

    def log_probs(prefix: list[int]) -> tuple[dict, float]:
        found = {token: math.log(p) for token, p in table[tuple(prefix)].items()}
        return found, found["end"]

    best, steps, left_open = best_first(trie, log_probs)
    assert [(trie.prefix(step.node), round(math.exp(step.log_prob), 9)) for step in steps] == [
        ([], 1.0), ([the], 0.5), ([the, tower], 0.4)]  # fmt: skip
    assert steps[0].answer_log_prob is None and math.exp(steps[1].answer_log_prob) == pytest.approx(0.05)
    assert best == [Step(steps[2].node, steps[2].log_prob, pytest.approx(math.log(0.36)))]
    assert [(trie.prefix(node), round(math.exp(log_prob), 9)) for log_prob, node in left_open] == [([year], 0.3)]


@pytest.mark.parametrize("num_best", [1, 3, 100])
def test_finds_the_n_best_of_brute_force_and_runs_no_prefix_without_need(num_best):
    rng = random.Random(num_best)
    for _ in range(300):
        candidates = list({tuple(rng.choices(range(3), k=rng.randint(1, 5))) for _ in range(rng.randint(0, 30))})
        trie = make_trie(candidates)
        prefixes = {ids[:size] for ids in [*candidates, ()] for size in range(len(ids) + 1)}
        model = {ids: {token: math.log(rng.random()) for token in [0, 1, 2, "end"]} for ids in prefixes}
        score = {ids: list(itertools.accumulate(model[ids[:size]][ids[size]] for size in range(len(ids)))) for ids in prefixes}
        expected = sorted((score[ids][-1] + model[ids]["end"] for ids in candidates), reverse=True)[:num_best]
        log_probs = {ids: (found, found["end"]) for ids, found in model.items()}
        best, steps, left_open = best_first(trie, lambda prefix, log_probs=log_probs: log_probs[tuple(prefix)], num_best)
        assert [step.answer_log_prob for step in best] == expected
        assert len({step.node for step in steps}) == len(steps)
        worst = expected[-1] if len(expected) == num_best else -math.inf
        assert all(step.log_prob > worst for step in steps) and all(log_prob <= worst for log_prob, _ in left_open)
        assert [log_prob for log_prob, _ in left_open] == sorted((log_prob for log_prob, _ in left_open), reverse=True)


def test_pieces_of_a_passage_are_one_list_of_spans():
    prompts = [Prompt(index, f"q{index}", Piece([], "", 0), [], []) for index in (0, 0, 1)]

    def piece(prompt, spans, bound, refusal):
        return Extraction(prompt, [Span(*span) for span in spans], 2, bound, 5, 2, 7, refusal)

    found = join_pieces([
        piece(prompts[0], [("a", 0, 1, -1.0), ("b", 2, 3, -2.0)], -math.inf, -3.0),
        piece(prompts[1], [("b", 9, 10, -0.5), ("c", 4, 5, -4.0)], -1.5, -2.0),
        piece(prompts[2], [], -math.inf, None),
    ])  # fmt: skip
    assert [extraction.prompt.example_index for extraction in found] == [0, 1]
    assert found[0].spans == [("b", 9, 10, -0.5), ("a", 0, 1, -1.0)]
    assert found[0].refusal_log_prob == -3.0 and found[0].gap is None  # the open prefix is below the second best of all
    assert (found[0].num_expanded, found[0].num_passes, found[0].num_positions) == (10, 4, 14)
    assert (found[1].num_expanded, found[1].num_passes, found[1].num_positions, found[1].gap) == (5, 2, 7, None)
    unsure = piece(prompts[0], [("a", 0, 1, -1.0), ("b", 2, 3, -2.0)], -0.75, None)
    assert unsure.gap == 0.25
    line = describe_work([unsure, found[0]])
    assert "1 of 2 not proven" in line and "0.25" in line and "median 5" in line and "at most 10" in line
