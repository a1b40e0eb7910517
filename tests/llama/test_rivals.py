"""The best answers over many passages, found without a full search in each.

One worked case: two answers are wanted. Passage 0 has evidence -0.4, then passage 3 has -2.0: from now on the floor is -2.0. An
answer of passage 5 with -3.1 changes nothing; one with -1.0 raises the floor to -1.0.
"""

from __future__ import annotations

import math

import pytest

from qa.asking import Reply, rank_answers
from qa.data.squad import Example, Passage
from qa.llama.encode import encode_passages
from qa.llama.extract import extract
from qa.llama.prompt import PromptTemplate
from qa.llama.rivals import Rivals, log_odds
from qa.prediction import Candidate

TEXTS = ["The tower was built in 1889 by the engineer Gustave Eiffel.", "The Normans were famed for their spirit.",
         "In which year did the war end? It is 330 metres tall.",
         "A major political impact on medieval Europe and the Near East.",
         "Who built it? The tower of the river.", "The name of the river is the Seine, and the war was long. " * 4]


def test_worked_case():
    rivals = Rivals(2, 0.0)
    assert not rivals.refuses(None)
    for passage, evidence, floor in ((0, -0.4, -math.inf), (0, -0.7, -math.inf), (3, -2.0, -2.0), (5, -3.1, -2.0),
                                     (5, -1.0, -1.0)):
        rivals.add(passage, evidence, False)
        assert rivals.floor_of(False) == floor


def test_where_one_passage_answers_refusing_ones_are_not_searched():
    rivals = Rivals(1, 0.0)
    assert rivals.refuses(math.log(0.9))
    rivals.add(0, -0.1, True)
    assert rivals.floor_of(True) == -0.1 and not rivals.refuses(math.log(0.2))
    assert rivals.floor_of(True) == math.inf and rivals.floor_of(False) == -math.inf
    assert log_odds(math.log(0.8)) == pytest.approx(math.log(4))


@pytest.mark.parametrize("micro_tokens", [4096, 150])
@pytest.mark.parametrize("threshold", [-1000.0, None, 1000.0])
@pytest.mark.parametrize("is_v2", [False, True])
@pytest.mark.parametrize("num_best", [1, 2, 4])
def test_the_answers_are_those_of_full_searches(tiny_llama, byte_level_tokenizer, num_best, is_v2, threshold, micro_tokens):
    template = PromptTemplate(byte_level_tokenizer, "plain", is_v2=is_v2)
    passages = [Passage("", text, [Example(str(number), "When was the tower built?", (), (), False, False)])
                for number, text in enumerate(TEXTS)]
    prompts, _ = encode_passages(template, passages, 400, 20, 8)
    full = extract(tiny_llama, template, prompts, 8, micro_tokens, num_best)
    if threshold is None:  # refuses in half of the passages
        odds = sorted(log_odds(one.refusal_log_prob) for one in full) if is_v2 else [0.0] * 6
        threshold = (odds[2] + odds[3]) / 2
    pruned = extract(tiny_llama, template, prompts, 8, micro_tokens, num_best, rivals=Rivals(num_best, threshold))
    assert ranked(pruned, threshold, num_best) == ranked(full, threshold, num_best)
    assert all(one.gap is None for one in pruned)
    assert sum(one.num_expanded for one in pruned) <= sum(one.num_expanded for one in full)


def test_below_the_floor_nothing_is_searched(tiny_llama, byte_level_tokenizer):
    prompts, _ = encode_passages(PromptTemplate(byte_level_tokenizer), [
        Passage("", TEXTS[0], [Example("q", "When was the tower built?", (), (), False, False)])], 400, 20, 8)
    template, rivals = PromptTemplate(byte_level_tokenizer), Rivals(1, 0.0)
    (full,) = extract(tiny_llama, template, prompts, 8, 4096)
    rivals.refuses(None)
    rivals.add(99, full.spans[0].log_prob + 20, False)
    (pruned,) = extract(tiny_llama, template, prompts, 8, 4096, rivals=rivals)
    assert full.num_expanded > 0 == pruned.num_expanded and pruned.spans == [] and pruned.gap is None


def ranked(found, threshold: float, num_best: int) -> list[tuple]:
    replies = []
    for one in found:
        candidates = [Candidate(*span, 0.0) for span in one.spans]
        refused = not candidates or (one.refusal_log_prob is not None and log_odds(one.refusal_log_prob) > threshold)
        replies.append(Reply("", candidates, refused, None, one.refusal_log_prob))
    return [(best.passage, best.answer.start_char, best.answer.text, pytest.approx(best.evidence, abs=1e-4), best.no_answer)
            for best in rank_answers(replies, num_best)]
