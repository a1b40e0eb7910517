"""The search of many prefixes at a time, a dict in the model's place, against the plain search and brute force."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest

from qa.llama.candidates import ROOT, Trie, row_of_one
from qa.llama.encode import Piece, Prompt
from qa.llama.schedule import Search
from qa.llama.search import Extraction, best_first

TEXT = "The tower 1889"


def make_trie(candidates: dict[tuple[int, ...], tuple[int, int]]) -> Trie:
    """{tokens: [start_char, end_char)} -> their trie."""
    starts, ends = zip(*candidates.values(), strict=True)
    rows = [row_of_one(list(ids), number, number) for number, ids in enumerate(candidates)]
    return Trie(rows, SimpleNamespace(text="", starts=starts, ends=ends))


def run(model: dict[tuple[int, ...], dict], trie: Trie, text: str, num_best: int, max_expansions: float = math.inf,
        rng: random.Random | None = None) -> Extraction:
    """What extract.py does with the search of one question. model: {tokens so far: {next token, or "end": log P}}.

    rng: makes the cache of every pass small, and forget everything now and then.
    """
    search = Search(Prompt(0, "q", Piece([], text, 100), [], []), trie, num_best, max_expansions)
    expanded = [ROOT]

    def expand(node: int) -> None:
        found = model[tuple(trie.prefix(node))]
        search.expand(node, [found[token] for token in trie.children(node)], found["end"])

    expand(ROOT)
    while not search.is_done:
        room = 1000
        if rng:
            room = rng.randint(1, 6)
            if rng.random() < 0.3:
                search.columns.clear()
        fed = search.choose(room, at_least_one=True)
        assert fed and (len(fed) <= room or set(fed) <= set(trie.path(fed[-1])))  # one path may be longer
        for node in fed:
            assert node not in search.columns and set(trie.path(node)[:-1]) <= search.columns.keys()  # once, after its parent
            search.columns[node] = len(search.columns)
        fresh = [node for node in fed if node in search.fresh]
        for node in fresh:
            expand(node)
        expanded += fresh
        search.num_passes += 1
        search.num_positions += len(fed)
    assert len(set(expanded)) == len(expanded) == search.num_expanded + 1
    return search.result()


def test_a_search_of_three_candidates():
    """P("The") = 0.5 * 0.1, P("The tower") = 0.5 * 0.8 * 0.9 = 0.36, P("1889") = 0.4 * 0.5 = 0.2."""
    trie = make_trie({(7,): (0, 3), (7, 8): (0, 9), (9,): (10, 14)})
    model = {(): {7: 0.5, 9: 0.4, "end": 0.1}, (7,): {8: 0.8, "end": 0.1}, (7, 8): {"end": 0.9}, (9,): {"end": 0.5}}
    model = {ids: {token: math.log(p) for token, p in found.items()} for ids, found in model.items()}
    found = run(model, trie, TEXT, num_best=2)
    assert [span[:3] for span in found.spans] == [("The tower", 100, 109), ("1889", 110, 114)]
    assert [math.exp(span.log_prob) for span in found.spans] == pytest.approx([0.36, 0.2])
    assert (found.num_expanded, found.num_passes, found.num_positions, found.gap) == (3, 1, 3, None)  # " tower": at a guess

    # One expansion is that of "The". Then " tower" and "1889" are open, each with 0.4, 8 times as much as "The" has.
    found = run(model, trie, TEXT, num_best=2, max_expansions=1)
    assert [span.text for span in found.spans] == ["The"] and found.gap is not None
    assert (found.num_expanded, found.num_passes, found.num_positions) == (1, 1, 1)
    assert found.gap == pytest.approx(math.log(8))


def random_case(rng: random.Random) -> tuple[dict, Trie, str, list[float]]:
    """A model, a trie, a passage, and the score of every candidate, best first. Half of the models know ties only."""
    is_tied = rng.random() < 0.5
    candidates: dict[tuple[int, ...], tuple[int, int]] = {}
    for _ in range(rng.randint(1, 30)):
        candidates.setdefault(tuple(rng.choices(range(3), k=rng.randint(1, 5))), (len(candidates), len(candidates) + 1))
    trie = make_trie(candidates)

    def log_prob() -> float:
        return rng.choice([-2.0, -1.0, -1.0, 1e-7]) if is_tied else math.log(rng.random())  # 1e-7: rounding does so

    model: dict[tuple[int, ...], dict] = {}
    scores = []
    for ids in {candidate[:size] for candidate in candidates for size in range(len(candidate) + 1)}:
        following = {other[len(ids)] for other in candidates if other[: len(ids)] == ids and len(other) > len(ids)}
        model[ids] = {token: log_prob() for token in [*following, "end"]}
    for ids in candidates:
        steps = [model[ids[:size]][token] for size, token in enumerate([*ids, "end"])]
        scores.append(sum(min(step, 0.0) for step in steps))
    return model, trie, "abcdefghijklmnopqrstuvwxyzABCD"[: len(candidates)], scores


def test_finds_the_n_best_of_brute_force_and_of_the_plain_search():
    rng = random.Random(0)
    for _ in range(500):
        model, trie, text, scores = random_case(rng)
        num_best = rng.choice([1, 2, 3, 10])
        found = run(model, trie, text, num_best, rng=rng)
        assert [span.log_prob for span in found.spans] == sorted(scores, reverse=True)[:num_best]
        assert [scores[span.start_char - 100] for span in found.spans] == [span.log_prob for span in found.spans]
        assert [text[span.start_char - 100] for span in found.spans] == [span.text for span in found.spans]
        assert len({span.text for span in found.spans}) == len(found.spans)
        assert found.gap is None
        best, _, _ = best_first(trie, lambda prefix, model=model: (model[tuple(prefix)], model[tuple(prefix)]["end"]), num_best)
        assert [step.answer_log_prob for step in best] == [span.log_prob for span in found.spans]


def test_a_budget_ends_the_search_with_the_gap_that_is_left():
    rng, kinds = random.Random(1), set()
    for _ in range(500):
        model, trie, text, scores = random_case(rng)
        num_best, budget = rng.choice([1, 3]), rng.choice([1, 4, 10])
        found = run(model, trie, text, num_best, budget, rng)
        assert found.spans and (found.num_expanded <= budget or len(found.spans) == 1)  # it goes on until there is one
        kinds.add(found.gap is None)
        if found.gap is None:
            assert [span.log_prob for span in found.spans] == sorted(scores, reverse=True)[:num_best]
        else:
            assert found.num_expanded >= budget and max(scores) - found.spans[0].log_prob <= found.gap
    assert kinds == {True, False}
