"""Drafts: greedy decoding in fewer forward passes, with the same answer. Skip on first reading.

An answer mostly copies the passage. So we guess that it goes on as the passage does, and run several guessed tokens through
the model at once. The model's own choice after each of them tells which guesses were right:

    answer so far            Gustave
    draft                               Eif | fel |  in | 1889
    the model's choices      Eif        fel | <end>                after Gustave, after Eif, after fel, ...
    accepted                            Eif   fel                  the answer is "Gustave Eiffel", in one pass instead of three

Saxena 2023, "Prompt Lookup Decoding"; Leviathan et al. 2023, arXiv:2211.17192, for drafts in general. Used by: greedy.py.
"""

from __future__ import annotations

MOST = 4  # tokens of a draft: as many as SQuAD's answers have, on average


def make_draft(passage: list[int], answer: list[int], room: int) -> list[int]:
    """At most `room` tokens: those after the first place in the passage of the answer so far; none if it has no such place."""
    size = min(MOST, room)
    for end in range(len(answer), len(passage)):
        if passage[end - 1] == answer[-1] and passage[end - len(answer) : end] == answer:
            return passage[end : end + size]
    return []


def accept(draft: list[int], choices: list[int]) -> int:
    """How many of the draft's first tokens are right. choices[i]: what the model takes where the draft has draft[i]."""
    num_right = 0
    while num_right < len(draft) and draft[num_right] == choices[num_right]:
        num_right += 1
    return num_right
