"""The refusal, scored over a cache that has been read, against full forward passes."""

from __future__ import annotations

import random

import pytest
import torch

from qa.llama.encode import Piece, Prompt
from qa.llama.greedy import next_log_probs
from qa.llama.prompt import PromptTemplate
from qa.llama.reading import chosen_log_probs, next_logits, read, refusal_log_probs


@pytest.fixture
def template(byte_level_tokenizer):
    template = PromptTemplate(byte_level_tokenizer, "plain")
    template.instruction_ids = [3, 4, 5]
    return template


@pytest.fixture
def prompts():
    """9 questions on 3 passages, random tokens."""
    rng = random.Random(9)
    pieces = [Piece([rng.randrange(2, 370) for _ in range(rng.randint(3, 25))], "", 0) for _ in range(3)]
    return [Prompt(number, f"q{number}", pieces[number % 3], [rng.randrange(2, 370) for _ in range(rng.randint(2, 8))], [])
            for number in range(9)]


@torch.inference_mode()
def test_score_of_the_refusal_and_no_trace_in_the_cache(tiny_llama, byte_level_tokenizer, template, prompts):
    (reading,) = read(tiny_llama, template, prompts, 100_000)
    assert refusal_log_probs(tiny_llama, reading, template) == [None] * 9
    template = PromptTemplate(byte_level_tokenizer, "plain", is_v2=True)
    (reading,) = read(tiny_llama, template, prompts, 100_000)
    length = reading.cache.length
    scores = refusal_log_probs(tiny_llama, reading, template)
    assert scores == refusal_log_probs(tiny_llama, reading, template)
    assert refusal_log_probs(tiny_llama, reading, template, chunk=4) == pytest.approx(scores, abs=1e-4)
    assert reading.cache.length == length
    *ids, _ = template.answer_ids(template.refusal)
    for prompt, found in zip(reading.prompts, scores, strict=True):
        prompt_ids = template.instruction_ids + prompt.piece.ids + prompt.question_ids
        steps = [next_log_probs(tiny_llama, prompt_ids + ids[:size]) for size in range(len(ids) + 1)]
        expected = sum(float(step[id]) for step, id in zip(steps, ids, strict=False))
        expected += float(steps[-1][template.end_token_ids].logsumexp(dim=-1))
        assert found == pytest.approx(expected, abs=1e-4)


@torch.inference_mode()
def test_chosen_log_probs_are_entries_of_the_whole_table(tiny_llama, template):
    hidden, before, tokens = torch.randn(5, 64), torch.tensor([4, 0, 0, 3, 4, 1]), torch.tensor([7, 7, 300, 12, 8, 0])
    table = next_logits(tiny_llama, hidden).log_softmax(dim=-1)
    for chunk in (1, 2, 5, 9):
        log_probs, end_log_probs = chosen_log_probs(tiny_llama, template, hidden, before, tokens, chunk)
        torch.testing.assert_close(log_probs, table[before, tokens])
        torch.testing.assert_close(end_log_probs, table[:, template.end_token_ids].logsumexp(dim=-1))
