"""Exact decoding against brute force: every candidate scored by plain forward passes of transformers' model."""

from __future__ import annotations

import random

import pytest
import torch

from qa.llama.encode import Passage, Prompt
from qa.llama.extract import extract
from qa.llama.prompt import PromptTemplate

WORDS = ["tower", "the", "The", "Norman", "1889", "12", "in", "of", "Eiffel", "war", "x", "naïve", "engineer", "river"]
MARKS = [".", ",", "(", ")", "-", "'", "_", "%", "...", "</s>", "塔"]


def random_text(rng: random.Random) -> str:
    text = rng.choice(["", "", " ", "("])
    for _ in range(rng.randint(1, 9)):
        text += rng.choice(WORDS + MARKS) + rng.choice([" ", " ", " ", "", "  ", "\n", " \n\t", "\t"])
    return text


def make_template(tokenizer, is_v2=False):
    """Random weights seldom end an answer: every eighth token does too."""
    template = PromptTemplate(tokenizer, "plain", is_v2)
    template.end_token_ids = sorted({*template.end_token_ids, *range(300, 370, 8)})
    return template


@pytest.fixture(params=["byte_level", "sentencepiece"])
def template(request):
    return make_template(request.getfixturevalue(f"{request.param}_tokenizer"))


def sharp(model, factor=3.0):
    """Random weights are unsure of everything; these prefer some tokens by far."""
    model.lm_head.weight.data *= factor
    return model


def make_case(template, seed, num_passages=2):
    """Prompts, their passages' texts, all about random passages."""
    rng = random.Random(seed)
    prompts, texts = [], {}
    for _ in range(num_passages):
        text = random_text(rng)
        passage = Passage(template.passage_ids(text), start_char=rng.randint(0, 9), end_char=0)
        texts[passage] = text
        for _ in range(rng.randint(1, 3)):
            question = template.question_ids(" ".join(rng.choices(WORDS, k=3)))
            prompts.append(Prompt(len(prompts), f"q{len(prompts)}", passage, question, []))
    rng.shuffle(prompts)
    return prompts, texts


def kind_of(character):
    return "blank" if character.isspace() else "letter" if character.isalpha() else "digit" if character.isdigit() else None


def all_candidates(template, text, max_tokens):
    """{token ids without the end: all places}, by the definition: two loops, each string encoded for itself."""
    edges = [place for place in range(len(text) + 1) if place in (0, len(text))
             or kind_of(text[place - 1]) is None or kind_of(text[place - 1]) != kind_of(text[place])]  # fmt: skip
    places = {}
    for start in edges:
        for end in edges:
            if start < end and text[start:end] == text[start:end].strip():
                ids = template.answer_ids(text[start:end])
                if len(ids) <= max_tokens:
                    places.setdefault(tuple(ids[:-1]), []).append((start, end))
    return places


@torch.no_grad()
def brute_force(model, template, prompt, sequences):
    """log P(tokens, end | prompt) of each sequence, in a row of its own: no cache, nothing shared."""
    begin = template.prefix_ids + prompt.passage.ids + prompt.question_ids
    scores = []
    for first in range(0, len(sequences), 64):
        part = sequences[first : first + 64]
        width = max(map(len, part))
        rows = torch.tensor([[*begin, *ids, *[0] * (width - len(ids))] for ids in part])  # padding stands behind all
        log_probs = model(rows, use_cache=False).logits[:, len(begin) - 1 :].float().log_softmax(dim=-1)
        for row, ids in zip(log_probs, part, strict=True):
            end = row[len(ids), template.end_token_ids].logsumexp(dim=-1)
            scores.append(float(row[range(len(ids)), list(ids)].sum() + end))
    return scores


def check(model, template, found, text, max_tokens, num_best):
    """The n best, with scores, places and texts; spans that are equally probable but for rounding may change places."""
    places = all_candidates(template, text, max_tokens)
    sequences = list(places)
    scores = dict(zip(sequences, brute_force(model, template, found.prompt, sequences), strict=True)) if sequences else {}
    expected = sorted(scores.values(), reverse=True)[:num_best]
    assert [span.log_prob for span in found.spans] == pytest.approx(expected, abs=1e-4)
    offset = found.prompt.passage.start_char
    for span in found.spans:
        place = (span.start_char - offset, span.end_char - offset)
        ids = tuple(template.answer_ids(span.text)[:-1])
        assert text[slice(*place)] == span.text and place in places[ids]
        assert scores[ids] == pytest.approx(span.log_prob, abs=1e-4)
    assert len({span.text for span in found.spans}) == len(found.spans)
    assert found.is_proven and found.gap == 0


@pytest.mark.parametrize("seed", range(20))
def test_finds_the_n_best_of_brute_force(tiny_llama_factory, template, seed):
    """5 cases in each of 40 tests: 200. Batches and rows of all sizes, answers short and long."""
    rng = random.Random(seed)
    model = sharp(tiny_llama_factory(seed=seed, num_kv_heads=rng.choice([1, 2, 4])), rng.choice([1, 2, 4]))
    num_cases = 0
    while num_cases < 5:
        prompts, texts = make_case(template, rng.random())
        max_tokens, num_best = rng.choice([1, 2, 4, 8, 30]), rng.choice([1, 1, 3, 10])
        micro_tokens = rng.choice([1, 60, 200, 10_000])
        found = extract(model, template, prompts, texts, max_tokens, micro_tokens, num_best)
        assert [extraction.prompt for extraction in found] == prompts
        for extraction in found[: 5 - num_cases]:
            check(model, template, extraction, texts[extraction.prompt.passage], max_tokens, num_best)
            num_cases += 1
