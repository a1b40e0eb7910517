"""One question to many passages: the answers found so far, and what an answer in another passage must beat.

A passage without the answer has many spans of like, low probability. To find the best of them, and to prove it, takes most of
the work. But only the `num_best` best answers over all passages are asked for. Once so many passages have an answer each, the
worst of these is a floor: a prefix below it can be left alone, in every passage. The answers are the same, and still proven.

    evidence     log P(answer) - log P(refusal) in its passage, or log P(answer) if the model may not refuse (qa/asking.py)
    floor        the num_best-th largest of the passages' best evidences so far; -inf while there are fewer passages

    num_best 2; found so far: passage 0 has -0.4 and -0.7, passage 3 has -2.0, passage 5 has -3.1     the floor is -2.0

The spans of passages in which the model refuses count only if it refuses in all (`rank_answers`). So once a passage has an
answer, no other is searched in which the model refuses. Used by: schedule.py, extract.py, llama/reader.py.
"""

from __future__ import annotations

import math


def log_odds(log_prob: float) -> float:
    """log(p / (1 - p)). Of the refusal it is the no-answer score: above 0, refusing has a probability of more than a half."""
    log_prob = min(log_prob, -1e-9)  # a sum of rounded terms may reach 0
    return log_prob - math.log(-math.expm1(log_prob))


class Rivals:
    def __init__(self, num_best: int, na_threshold: float):
        self.num_best, self.na_threshold = num_best, na_threshold
        self.all_refuse = True  # as far as we know
        self.best: dict[int, float] = {}  # example_index -> evidence of its best answer
        self.floor = -math.inf

    def refuses(self, refusal_log_prob: float | None) -> bool:
        """Whether the model refuses in a passage. The first in which it does not makes all answers of refusing ones void."""
        refused = refusal_log_prob is not None and log_odds(refusal_log_prob) > self.na_threshold
        if self.all_refuse and not refused:
            self.all_refuse, self.best, self.floor = False, {}, -math.inf
        return refused

    def floor_of(self, refuses: bool) -> float:
        return math.inf if refuses and not self.all_refuse else self.floor

    def add(self, example_index: int, evidence: float, refuses: bool) -> None:
        if evidence > self.floor_of(refuses):
            self.best[example_index] = max(evidence, self.best.get(example_index, -math.inf))
            if len(self.best) >= self.num_best:
                self.floor = sorted(self.best.values())[-self.num_best]
