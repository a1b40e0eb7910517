"""Every family of decoders: packing, decoders, adapters, prompts, against transformers and peft; and what is refused.

One worked case. Qwen3's chat template writes an empty thought before the answer where thinking is off, so the engineered
prompt ends in "<think>\\n\\n</think>\\n\\nAnswer:".
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_llama
from qa import weights
from qa.data.squad import Example, Passage
from qa.errors import Stopped, UserError
from qa.families import FAMILIES
from qa.llama import exactness
from qa.llama.adapter import load_adapter, read_adapter, read_tensors, save_adapter
from qa.llama.base_fingerprint import base_fingerprint
from qa.llama.candidates import answer_string
from qa.llama.encode import encode_passages
from qa.llama.exactness import check_exactness
from qa.llama.extract import extract
from qa.llama.greedy import generate, next_log_probs
from qa.llama.lora import inject_lora, lora_layers
from qa.llama.loss import AnswerLoss, plain_answer_loss
from qa.llama.model import context_length, load_llama
from qa.llama.packing import collate, micro_batches
from qa.llama.prompt import PromptTemplate
from qa.llama.targets import LoraSpec
from qa.llama.units import SMALL_UNITS, Units

# model_type -> the start of its classes' names, the tokenizer, and how its template writes system, user, assistant
CHATML = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
THOUGHT = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
INST = ("{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {% if loop.index0 == 1 %}"
        "{{ messages[0].content }}\n\n{% endif %}{{ message.content }} [/INST]{% elif message.role == 'assistant' %} "
        "{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}")
DECODERS = {"llama": ("Llama", "byte_level_tokenizer", CHATML), "mistral": ("Mistral", "sentencepiece_tokenizer", INST),
            "qwen2": ("Qwen2", "byte_level_tokenizer", CHATML),
            "qwen3": ("Qwen3", "byte_level_tokenizer", CHATML.replace("{% endif %}", THOUGHT + "{% endif %}"))}
SIZES = dict(vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, initializer_range=0.1, head_dim=16,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
             pad_token_id=1, tie_word_embeddings=False)
TEXT = "The tower was built in 1889 by Gustave Eiffel, it is 330 m."
QUESTIONS = ["When was the tower built?", "Who built it?", " How tall?"]


@pytest.fixture(params=DECODERS)
def family(request) -> str:
    return request.param


@pytest.fixture
def save(family, request, tmp_path):
    """save(sliding_window=64) -> a folder with random weights, biases too."""
    def make(**more) -> Path:
        name, kind, chat = DECODERS[family]
        tokenizer = request.getfixturevalue(kind)
        tokenizer.chat_template = chat
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES | more))
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.data.normal_(0, 0.3)
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        return tmp_path / "base"
    return make


def passages(text: str = TEXT) -> list[Passage]:
    return [Passage("t", text, [Example(str(number), question, (), (), False, True)
                                for number, question in enumerate(QUESTIONS)])]


def encoded(template: PromptTemplate, length: int = 0):
    return encode_passages(template, passages(), 512, max_new_tokens=length)[0]


def test_worked_case(tmp_path, byte_level_tokenizer):
    byte_level_tokenizer.chat_template = DECODERS["qwen3"][2]
    cue = PromptTemplate(byte_level_tokenizer, "engineered")._frame.cue
    assert cue == "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nAnswer:"


def test_packed_rows_equal_separate_rows(family, save):
    """Loss and gradient, in double precision."""
    model, tokenizer = load_llama(save(), torch.float64)
    assert type(model).__name__ == f"{DECODERS[family][0]}ForCausalLM"
    template = PromptTemplate(tokenizer)
    prompts = encoded(template, 8)
    for prompt in prompts:
        prompt.answer_ids.extend(template.answer_ids(prompt.id * 3))
    expected = plain_answer_loss(model, prompts, template.instruction_ids)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    (rows,) = micro_batches(prompts, len(template.instruction_ids), 10_000)
    assert len(rows) == 1
    loss = AnswerLoss(model)(collate(rows, template.instruction_ids))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-8)
    for one, other in zip(torch.autograd.grad(loss, list(model.parameters())), gradients, strict=True):
        assert (one - other).norm() <= 1e-8 * other.norm() + 1e-12


@pytest.mark.parametrize("kind", ["plain", "engineered"])
def test_greedy_equals_transformers_generate(kind, family, save):
    model, tokenizer = load_llama(save())
    template = PromptTemplate(tokenizer, kind)
    prompts = encoded(template, 12)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([template.instruction_ids + prompt.piece.ids + prompt.question_ids])
        stops = [*template.end_token_ids, *template.closing_token_ids]
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                                 eos_token_id=stops, pad_token_id=1)[0, ids.shape[1]:].tolist()
        expected.append([id for id in written if id not in template.end_token_ids])
    found = generate(model, template, prompts, 12, micro_tokens=4096)
    assert [answer.token_ids for answer in found] == expected and any(expected)


def test_exact_search_equals_brute_force(family, save):
    model, tokenizer = load_llama(save())
    template = PromptTemplate(tokenizer)
    prompts = encode_passages(template, passages("In 1889 (é), by me."), 512, max_new_tokens=6)[0][:1]
    for prompt, found in zip(prompts, extract(model, template, prompts, 6, micro_tokens=4096), strict=True):
        units, before = Units(prompt.piece.text, SMALL_UNITS), template.instruction_ids + prompt.piece.ids + prompt.question_ids
        by_tokens = {}
        for first in range(len(units)):
            for last in range(first, len(units)):
                ids = template.encode_within_answer([answer_string(units, first, last)], begin=True)[0]
                if len(ids) < 6:
                    by_tokens[tuple(ids)] = units.string(first, last)
        values = {}
        for ids, text in by_tokens.items():
            steps = [next_log_probs(model, before + list(ids[:place])) for place in range(len(ids) + 1)]
            values[text] = sum(float(step[id]) for step, id in zip(steps, ids, strict=False)) \
                + float(steps[-1][template.end_token_ids].logsumexp(dim=-1))
        best = max(values, key=values.get)
        assert found.spans[0].text == best and found.spans[0].log_prob == pytest.approx(values[best], abs=1e-4)
        assert found.gap is None and len(values) > 10


def test_adapter_goes_to_peft_and_comes_back(family, save, tmp_path):
    folder = save()
    model, tokenizer = load_llama(folder)
    spec = LoraSpec(("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"), rank=4)
    fingerprint = base_fingerprint(model)
    inject_lora(model, spec)
    for layer in lora_layers(model).values():
        layer.lora_B.weight.data.normal_(0, 0.1)
    save_adapter(model, tokenizer, spec, tmp_path / "ours", str(folder), fingerprint)
    ids = torch.arange(2, 40)[None]
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "ours")
    with torch.no_grad():
        expected = model(ids).logits
        assert (theirs(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        theirs.save_pretrained(tmp_path / "theirs")
        again, _ = load_llama(folder)
        assert load_adapter(again, read_adapter(tmp_path / "theirs")) == []
        assert torch.equal(again(ids).logits, expected)


def test_a_run_trains_and_resumes_to_the_bit(family, save, small_squad_file, monkeypatch, tmp_path):
    folder = save()

    def train(out: Path, *flags: str) -> None:
        monkeypatch.setattr("sys.argv", ["train_llama.py", "--model", str(folder), "--train-data", str(small_squad_file),
                                         "--dev-data", "none", "--max-train-questions", "6", "--batch-size", "1",
                                         "--max-length", "400", "--max-steps", "5", "--precision", "fp32", "--lora-dropout",
                                         "0.1", "--out", str(out), *flags])
        train_llama.main()

    train(tmp_path / "whole")
    with pytest.raises(Stopped):
        train(tmp_path / "cut", "--stop-after", "3")
    train(tmp_path / "cut", "--resume")
    one, other = (read_tensors(tmp_path / run / "model") for run in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert all(tensor.any() for name, tensor in one.items() if "lora_B" in name)


def test_end_tokens_and_prompts_of_each_template(family, save):
    """An answer ends as the assistant's turn does; the prompt is what the template writes of the same messages."""
    _, tokenizer = load_llama(save())
    template = PromptTemplate(tokenizer, "engineered")
    assert tokenizer.convert_ids_to_tokens(template.end_token_id) == ("</s>" if family == "mistral" else "<|im_end|>")
    [prompt] = encoded(template, 8)[:1]
    ids = template.instruction_ids + prompt.piece.ids + prompt.question_ids
    messages = [{"role": "system", "content": template.instruction},
                {"role": "user", "content": f"Passage:\n{TEXT}\n\nQuestion: {QUESTIONS[0]}"}]
    written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert tokenizer.decode(ids).replace(" ", "") == (written + "Answer:").replace(" ", "")


# ---- refused ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", ["Mamba", "T5", "GPT2", "Deberta", "Mixtral", "Gemma2"])
def test_other_families_are_refused_by_name_with_those_that_are_supported(config, byte_level_tokenizer, tmp_path):
    config = getattr(transformers, f"{config}Config")()
    config.save_pretrained(tmp_path)
    for refuse in (lambda: load_llama(tmp_path), lambda: weights.reader_family(tmp_path)):
        with pytest.raises(UserError) as error:
            refuse()
        message = str(error.value)
        assert "\n" not in message and all(repr(name) in message for name in (config.model_type, *DECODERS))
    assert DECODERS.keys() == {name for name, family in FAMILIES.items() if family.reader == "llama"}


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"], indirect=True)
def test_a_sliding_window_that_a_prompt_would_exceed_is_refused(family, save):
    slides = {"sliding_window": 64} | ({} if family == "mistral" else {"use_sliding_window": True, "max_window_layers": 1})
    model, _ = load_llama(save(**slides))
    assert context_length(model, 64) == 64
    for length in (65, None):
        with pytest.raises(UserError, match=f"--max-length {length or 512}: the model's sliding window has 64 tokens"):
            context_length(model, length)
    with pytest.raises(UserError, match="sliding window has 8 tokens"):
        load_llama(save(**slides | {"sliding_window": 8}))
    if family != "mistral":  # none of the layers has it, or it is switched off
        for unused in ({"max_window_layers": 2}, {"use_sliding_window": False}):
            assert context_length(load_llama(save(**slides | unused))[0], None) == 512


@pytest.mark.parametrize("damage, reason", [
    ("ignores positions", "a question gets other logits than alone"), ("mixes tokens", "a question sees the tokens of another"),
])
def test_a_model_that_does_not_do_what_packing_relies_on_is_refused(damage, reason, tiny_llama, monkeypatch):
    check_exactness(tiny_llama, "good")
    assert tiny_llama.config._attn_implementation == "sdpa"
    if damage == "ignores positions":
        rotate = tiny_llama.model.rotary_emb.forward
        monkeypatch.setattr(tiny_llama.model.rotary_emb, "forward", lambda x, position_ids: rotate(
            x, torch.arange(x.shape[1])[None] + position_ids[:, :1]))
    else:  # too little to be seen in the logits
        monkeypatch.setattr(exactness, "TOLERANCE", dict.fromkeys(exactness.TOLERANCE, math.inf))
        mlp = tiny_llama.model.layers[0].mlp
        forward = mlp.forward
        monkeypatch.setattr(mlp, "forward", lambda x: forward(x) + 1e-3 * x.mean(dim=1, keepdim=True))
    with pytest.raises(UserError, match=f"bad: with packed rows {reason}") as error:
        check_exactness(tiny_llama, "bad")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_alone_refuses_nothing(dtype, family, save):
    model, _ = load_llama(save(), dtype)
    assert model.dtype == dtype and json.loads((Path(model.name_or_path) / "config.json").read_text())["model_type"] == family
    assert AutoTokenizer.from_pretrained(model.name_or_path).is_fast
