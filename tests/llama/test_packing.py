"""Packed rows: the loss and the gradient of one row per question, at a fraction of the tokens."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qa.llama.attention import Layout, for_query_heads, packed_attention, use_packed_attention, visible
from qa.llama.encode import Piece, Prompt
from qa.llama.loss import AnswerLoss, plain_answer_loss
from qa.llama.packing import Row, collate, deal_rows, micro_batches

INSTRUCTION = [5, 6, 7]


def random_prompts(seed, num_passages=3, max_questions=4, vocab_size=384):
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(2, vocab_size) for _ in range(rng.randint(low, high))]

    prompts = []
    for _ in range(num_passages):
        piece = Piece(ids(3, 20), "", 0)
        for _ in range(rng.randint(1, max_questions)):
            prompts.append(Prompt(len(prompts), f"q{len(prompts)}", piece, ids(2, 8), [*ids(0, 4), 1]))
    return prompts


def loss_and_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tie, num_kv_heads", [(False, 2), (True, 1), (False, 4)])
@pytest.mark.parametrize("norm_in_fp64, tolerance", [(True, 1e-10), (False, 1e-6)])
def test_packed_equals_one_row_per_question(tiny_llama_factory, monkeypatch, tie, num_kv_heads, norm_in_fp64, tolerance):
    if norm_in_fp64:  # the stock norm computes in fp32 whatever the model's type

        def forward(self, hidden):
            return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

        monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    model = tiny_llama_factory(tie=tie, num_kv_heads=num_kv_heads).double()
    for seed in range(3):
        prompts = random_prompts(seed)
        expected, expected_gradients = loss_and_gradients(model, plain_answer_loss(model, prompts, INSTRUCTION))
        (rows,) = micro_batches(prompts, len(INSTRUCTION), micro_tokens=10_000)
        loss, gradients = loss_and_gradients(model, AnswerLoss(model)(collate(rows, INSTRUCTION)))
        assert loss == pytest.approx(expected, rel=tolerance)
        for name, gradient in gradients.items():
            difference = (gradient - expected_gradients[name]).norm()
            assert difference <= tolerance * expected_gradients[name].norm(), name


def test_gradient_checkpointing_changes_nothing(tiny_llama):
    (rows,) = micro_batches(random_prompts(5), len(INSTRUCTION), 10_000)
    answer_loss = AnswerLoss(tiny_llama.train())
    expected, expected_gradients = loss_and_gradients(tiny_llama, answer_loss(collate(rows, INSTRUCTION)))
    tiny_llama.gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradients = loss_and_gradients(tiny_llama, answer_loss(collate(rows, INSTRUCTION)))
    assert loss == expected
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)


def test_loss_does_not_depend_on_the_cut_into_micro_batches(tiny_llama):
    model = tiny_llama.double()
    prompts = random_prompts(4, num_passages=5)
    losses = []
    for micro_tokens in (1, 40, 90, 10_000):
        cut = [collate(rows, INSTRUCTION) for rows in micro_batches(prompts, len(INSTRUCTION), micro_tokens)]
        losses.append(sum(AnswerLoss(model)(micro_batch).item() for micro_batch in cut))
        assert sum(len(micro_batch.targets) for micro_batch in cut) == sum(len(prompt.answer_ids) for prompt in prompts)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def hidden_states(model, micro_batch):
    """[T, H], the pass of AnswerLoss up to the last layer."""
    use_packed_attention(model)
    segments = micro_batch.layout.spread(micro_batch.segments, fill=-1)
    mask = for_query_heads(visible(segments, segments), model)
    return model.model(micro_batch.input_ids[None], attention_mask=mask, use_cache=False,
                       position_ids=micro_batch.positions[None], layout=micro_batch.layout).last_hidden_state[0]  # fmt: skip


def test_a_question_sees_nothing_of_the_others(tiny_llama):
    """Other tokens in one segment of one row change nothing elsewhere, not even the last bit."""
    (rows,) = micro_batches(random_prompts(1, num_passages=3), len(INSTRUCTION), 10_000)
    micro_batch = collate(rows, INSTRUCTION)
    before = hidden_states(tiny_llama, micro_batch)
    for row in range(len(rows)):
        for segment in range(1, len(rows[row].prompts) + 1):
            changed = (micro_batch.layout.rows == row) & (micro_batch.segments == segment)
            assert changed.any()
            other = replace(micro_batch, input_ids=torch.where(changed, 383 - micro_batch.input_ids, micro_batch.input_ids))
            after = hidden_states(tiny_llama, other)
            assert torch.equal(before[~changed], after[~changed])
            assert not torch.equal(before[changed], after[changed])


def test_rows_together_equal_rows_alone(tiny_llama):
    model = tiny_llama.double()
    (rows,) = micro_batches(random_prompts(2, num_passages=4), len(INSTRUCTION), 10_000)
    micro_batch = collate(rows, INSTRUCTION)
    assert len({row.num_tokens() for row in rows}) > 1
    together = hidden_states(model, micro_batch)
    for i, row in enumerate(rows):
        alone = hidden_states(model, collate([row], INSTRUCTION))
        assert torch.allclose(together[micro_batch.layout.rows == i], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("instruction_is_cached", [False, True])
def test_layout_matches_brute_force(instruction_is_cached):
    for seed in range(20):
        (rows,) = micro_batches(random_prompts(seed), len(INSTRUCTION), 10_000)
        micro_batch = collate(rows, INSTRUCTION, instruction_is_cached)
        assert micro_batch.prompts == [prompt for row in rows for prompt in row.prompts]
        tokens, predicted = [], []
        for i, row in enumerate(rows):
            whole = INSTRUCTION + row.piece.ids
            tokens += [(i, 0, place, token) for place, token in enumerate(whole)][len(INSTRUCTION) * instruction_is_cached :]
            for segment, prompt in enumerate(row.prompts, start=1):
                whole_prompt = whole + prompt.question_ids + prompt.answer_ids
                places = range(len(whole), len(whole_prompt) - 1)
                tokens += [(i, segment, place, whole_prompt[place]) for place in places]
                first = len(whole) + len(prompt.question_ids)
                predicted += [(i, segment, place - 1, whole_prompt[place]) for place in range(first, len(whole_prompt))]
        found = zip(micro_batch.layout.rows, micro_batch.segments, micro_batch.positions, micro_batch.input_ids, strict=True)
        assert [tuple(int(value) for value in values) for values in found] == tokens
        at = micro_batch.predicting
        found = zip(micro_batch.layout.rows[at], micro_batch.segments[at], micro_batch.positions[at], micro_batch.targets,
                    strict=True)
        assert [tuple(int(value) for value in values) for values in found] == predicted


def test_mask_matches_its_definition():
    torch.manual_seed(0)
    keys = torch.randint(-1, 4, (3, 11))
    for num_queries in (1, 4, 11):
        mask = visible(keys[:, -num_queries:], keys)
        assert mask.shape == (3, 1, num_queries, 11)
        for row in range(3):
            for query in range(num_queries):
                i = 11 - num_queries + query
                for j in range(11):
                    expected = j <= i and (keys[row, j] == 0 or keys[row, j] == keys[row, i])
                    assert mask[row, 0, query, j] == expected


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("is_cached", [False, True])
def test_attention_of_flat_rows_matches_a_loop(num_kv_heads, is_cached):
    """Every token and head by itself: softmax(q . k / sqrt(d)) v over the keys that it may see."""
    torch.manual_seed(0)
    rows = torch.tensor([0] * 5 + [1] * 2 + [2] * 4)
    layout = Layout.from_rows(rows, 3, is_cached)
    T, h, d, num_old = len(rows), 6, 8, 4 * is_cached
    query, key, value = (torch.randn(1, heads, T, d, dtype=torch.float64) for heads in (h, num_kv_heads, num_kv_heads))
    segments = layout.spread(torch.tensor([0, 0, 1, 2, 2, 0, 1, 0, 1, 1, 1]), fill=-1)
    old_segments = torch.randint(-1, 3, (3, num_old)).where(torch.arange(num_old) > 0, 0)
    all_segments = torch.cat([old_segments, segments], dim=1)  # [B, C]
    old = torch.randn(2, 3, num_kv_heads, num_old, d, dtype=torch.float64)
    all_keys, all_values = (torch.cat([old[i], layout.spread(new[0].transpose(0, 1)).transpose(1, 2)], dim=2)
                            for i, new in enumerate((key, value)))  # fmt: skip
    if is_cached:
        key, value = all_keys, all_values
    mask = visible(segments, all_segments).repeat(1, 1, h // num_kv_heads, 1)
    found, _ = packed_attention(None, query, key, value, mask, layout=layout, scaling=d**-0.5)
    assert found.shape == (1, T, h, d)
    for t in range(T):
        row, slot = divmod(int(layout.places[t]), layout.width)
        seen = [j for j in range(num_old + slot + 1) if all_segments[row, j] in (0, segments[row, slot])]
        for head in range(h):
            group = head // (h // num_kv_heads)
            scores = all_keys[row, group, seen] @ query[0, head, t] * d**-0.5
            assert torch.allclose(found[0, t, head], scores.softmax(0) @ all_values[row, group, seen], rtol=1e-12)


def test_stock_generate_still_works_after_packing(tiny_llama):
    """A call without a layout is transformers' own sdpa."""
    ids = torch.arange(2, 12)[None]
    expected = tiny_llama.generate(ids, max_new_tokens=5, do_sample=False)
    use_packed_attention(tiny_llama)
    assert torch.equal(tiny_llama.generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_decoding_rows_predict_after_the_cue():
    piece = Piece([9, 9], "", 0)
    rows = [Row(piece, [Prompt(0, "a", piece, [3, 4], []), Prompt(1, "b", piece, [3, 4, 8], [])])]
    micro_batch = collate(rows, INSTRUCTION)
    assert micro_batch.input_ids.tolist() == [5, 6, 7, 9, 9, 3, 4, 3, 4, 8]
    assert micro_batch.predicting.tolist() == [6, 9] and len(micro_batch.targets) == 0


@pytest.mark.parametrize("micro_tokens", [1, 30, 64, 200, 10_000])
def test_micro_batches_hold_every_question_once_within_the_bound(micro_tokens):
    for seed in range(20):
        prompts = random_prompts(seed, num_passages=6, max_questions=9)
        batches = micro_batches(prompts, len(INSTRUCTION), micro_tokens)
        found = [prompt for rows in batches for row in rows for prompt in row.prompts]
        assert sorted(prompt.example_index for prompt in found) == list(range(len(prompts)))
        for rows in batches:
            assert all(prompt.piece is row.piece for row in rows for prompt in row.prompts)
            size = len(rows) * (len(INSTRUCTION) + max(row.num_tokens() for row in rows))
            assert size <= micro_tokens or len(rows) == len(rows[0].prompts) == 1
    assert len(batches) == 1 or micro_tokens < 10_000


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_ranks_get_every_question_once_and_whole_passages(num_ranks):
    prompts = random_prompts(7, num_passages=4)
    shares = deal_rows(prompts, num_ranks, len(INSTRUCTION), micro_tokens=60)
    found = [[prompt for rows in share for row in rows for prompt in row.prompts] for share in shares]
    assert len(shares) == num_ranks
    assert sorted(prompt.example_index for share in found for prompt in share) == list(range(len(prompts)))
    pieces = [piece for share in found for piece in {prompt.piece for prompt in share}]
    assert len(pieces) == len(set(pieces)) == 4
    assert shares == [micro_batches(share, len(INSTRUCTION), 60) for share in found]
    even = deal_rows(prompts, num_ranks, len(INSTRUCTION), micro_tokens=60, even=True)
    assert {len(share) for share in even} == {max(map(len, shares))}
    assert [[rows for rows in share if rows[0].prompts] for share in even] == shares


def test_a_row_without_questions_adds_nothing_to_loss_and_gradient(tiny_llama):
    _, (*_, nothing) = deal_rows(random_prompts(3, num_passages=1), 2, len(INSTRUCTION), 10_000, even=True)
    loss = AnswerLoss(tiny_llama)(collate(nothing, INSTRUCTION))
    loss.backward()
    assert loss == 0 and all(not parameter.grad.any() for parameter in tiny_llama.parameters())


def test_logits_are_computed_where_an_answer_token_is_predicted_only(tiny_llama):
    prompts = random_prompts(3)
    (rows,) = micro_batches(prompts, len(INSTRUCTION), 10_000)
    shapes = []
    tiny_llama.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    AnswerLoss(tiny_llama)(collate(rows, INSTRUCTION))
    assert shapes == [(sum(len(prompt.answer_ids) for prompt in prompts), 384)]


@pytest.mark.parametrize("dtype, loss_dtype", [
    (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)])  # fmt: skip
def test_loss_is_at_least_fp32(tiny_llama, dtype, loss_dtype):
    (rows,) = micro_batches(random_prompts(3), len(INSTRUCTION), 10_000)
    assert AnswerLoss(tiny_llama.to(dtype))(collate(rows, INSTRUCTION)).dtype == loss_dtype
