"""Passages that are kept between questions.

One worked case: three passages are asked about twice. The first time the model reads them; the second time only the question.
The answers are those of a reader without a memory.
"""

from __future__ import annotations

import pytest
import torch

import qa.llama.reading as reading_module
from qa.data.squad import Example, Passage
from qa.llama.encode import encode_passages
from qa.llama.extract import extract
from qa.llama.memory import PassageMemory
from qa.llama.prompt import PromptTemplate

TEXTS = ["The tower was built in 1889 by the engineer Gustave Eiffel.", "The Normans were famed for their spirit.",
         "In which year did the war end? It is 330 metres tall. " * 3]
KINDS = ["plain", "engineered"]


def prompts_of(template, question: str, texts=TEXTS):
    passages = [Passage("", text, [Example(f"{number}", question, (), (), False, False)]) for number, text in enumerate(texts)]
    return encode_passages(template, passages, 400, 20, 8)[0]


def answers(model, template, question, memory=None, texts=TEXTS, micro_tokens=4096):
    prompts = prompts_of(template, question, texts)
    if memory is not None:
        memory.begin(template.instruction_ids, [prompt.piece for prompt in prompts])
    found = extract(model, template, prompts, 8, micro_tokens, 2, memory=memory)
    return [[(span.text, span.start_char, pytest.approx(span.log_prob, abs=1e-4)) for span in one.spans] for one in found]


@pytest.fixture
def tokens_fed(monkeypatch):
    """How many tokens each forward pass of reading takes."""
    fed = []

    def forward_tokens(model, cache, rows, *rest, original=reading_module.forward_tokens, **more):
        fed.append(len(rows))
        return original(model, cache, rows, *rest, **more)

    monkeypatch.setattr(reading_module, "forward_tokens", forward_tokens)
    return fed


@pytest.mark.parametrize("micro_tokens", [4096, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_worked_case(tiny_llama, byte_level_tokenizer, kind, micro_tokens, tokens_fed):
    template, memory = PromptTemplate(byte_level_tokenizer, kind, is_v2=True), PassageMemory(10**9)
    for question in ("When was it built?", "Who was famed?", "When was it built?"):
        expected = answers(tiny_llama, template, question, micro_tokens=micro_tokens)
        tokens_fed.clear()
        assert answers(tiny_llama, template, question, memory, micro_tokens=micro_tokens) == expected
    question_tokens = sum(len(prompt.question_ids) for prompt in prompts_of(template, "When was it built?"))
    refusals = 3 * (len(template.answer_ids(template.refusal)) - 1)
    assert sum(tokens_fed) == len(template.instruction_ids) + question_tokens + refusals


def test_what_is_kept_is_what_the_model_computes(tiny_llama, byte_level_tokenizer):
    template, memory = PromptTemplate(byte_level_tokenizer, "plain"), PassageMemory(10**9)
    answers(tiny_llama, template, "Who?", memory)
    prompt = prompts_of(template, "Who?")[0]
    ids = torch.tensor([template.instruction_ids + prompt.piece.ids])
    memory.begin(template.instruction_ids, [prompt.piece])
    kept = memory.kept[memory._key(prompt.piece)]
    with torch.no_grad():
        cache = tiny_llama(input_ids=ids, use_cache=True, attn_implementation="sdpa").past_key_values
    begin = len(template.instruction_ids)
    expected = [layer.keys[0, :, begin:].transpose(0, 1) for layer in cache.layers]
    expected += [layer.values[0, :, begin:].transpose(0, 1) for layer in cache.layers]
    torch.testing.assert_close(kept, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert memory.num_bytes == sum(layers.nbytes for layers in memory.kept.values()) and len(memory.kept) == 3


def test_never_more_than_the_limit_and_what_is_asked_about_now_stays(tiny_llama, byte_level_tokenizer):
    template, whole = PromptTemplate(byte_level_tokenizer, "plain"), PassageMemory(10**9)
    answers(tiny_llama, template, "Who?", whole)
    sizes = [layers.nbytes for layers in whole.kept.values()]
    memory = PassageMemory(sum(sizes) - 1)  # room for all but one
    for _ in range(2):
        expected = answers(tiny_llama, template, "Who?")
        assert answers(tiny_llama, template, "Who?", memory) == expected
        assert len(memory.kept) == 2 and memory.num_bytes <= memory.max_bytes
    before = set(memory.kept)
    answers(tiny_llama, template, "Who?", memory, texts=["Another passage about Eiffel, of a length that needs room. " * 3])
    assert len(before - set(memory.kept)) >= 1 and memory.num_bytes <= memory.max_bytes
    assert PassageMemory(0).kept == {} and answers(tiny_llama, template, "Who?", PassageMemory(0)) == expected
