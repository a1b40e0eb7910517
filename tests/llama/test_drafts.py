"""Drafts: which tokens are guessed, and which of them are right."""

from __future__ import annotations

import random

import pytest

from qa.llama import drafts
from qa.llama.drafts import accept, make_draft


@pytest.mark.parametrize("draft, choices, num_right", [
    ([], [7], 0),  # no draft: the pass says one token, as without drafts
    ([7, 8, 9], [7, 8, 9, 5], 3),  # all right: the pass says four tokens
    ([7, 8, 9], [7, 8, 4, 5], 2),  # 4 in place of 9
    ([7, 8, 9], [6, 8, 9, 5], 0),  # 8 and 9 follow a wrong token: their choices mean nothing
    ([7, 7], [7, 6, 7], 1),
])  # fmt: skip
def test_a_draft_is_right_up_to_its_first_wrong_token(draft, choices, num_right):
    assert accept(draft, choices) == num_right


@pytest.mark.parametrize("answer, room, draft", [
    ([2], 9, [3, 4, 2, 3]),  # four tokens at most, after the first place
    ([2, 3], 9, [4, 2, 3, 5]),
    ([3, 4], 2, [2, 3]),
    ([3, 5], 9, []),  # the passage ends there
    ([4, 3], 9, []),  # no place in the passage
    ([2], 0, []),
])  # fmt: skip
def test_a_draft_is_what_follows_in_the_passage(answer, room, draft):
    assert make_draft([1, 2, 3, 4, 2, 3, 5], answer, room) == draft


def test_a_draft_is_that_of_a_search_through_all_places(monkeypatch):
    monkeypatch.setattr(drafts, "MOST", 3)
    rng = random.Random(0)
    for _ in range(300):
        passage = [rng.randrange(4) for _ in range(rng.randint(0, 9))]
        answer = [rng.randrange(4) for _ in range(rng.randint(1, 4))]
        places = [i for i in range(len(passage)) if passage[i : i + len(answer)] == answer]
        end = places[0] + len(answer) if places else len(passage)
        assert make_draft(passage, answer, room=9) == passage[end : end + 3]
