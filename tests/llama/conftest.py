"""A tiny LLaMA with random weights, and tokenizers of both kinds, built offline, for every test of qa/llama.

`tiny_llama` is new in every test, so a test may inject, train and merge as it likes. Both tokenizers fit
into its vocabulary.
"""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 384

SENTENCES = [
    "The Norman dynasty had a major political impact on medieval Europe and the Near East.",
    "Passage: The tower was built in 1889 by the engineer Gustave Eiffel. It is 330 metres tall.",
    "Question: When was the tower built? Answer: 1889",
    "Who built the tower? What is the name of the river? In which year did the war end?",
    "The Normans were famed for their martial spirit and eventually for their Christian piety.",
    "Copy the shortest exact span of the passage that answers the question.",
]


def make_tiny_llama(tie: bool = False, num_kv_heads: int = 2, seed: int = 0, **more) -> LlamaForCausalLM:
    """2 layers, 64 wide, 4 heads of 16; fp32; sdpa. Weights are large enough that every token matters."""
    settings = dict(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        initializer_range=0.1, num_attention_heads=4, num_key_value_heads=num_kv_heads,
        max_position_embeddings=512, tie_word_embeddings=tie, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        attn_implementation="sdpa",
    )  # fmt: skip
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(settings | more))).eval()
    torch.set_rng_state(state)
    return model


def make_byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """In the manner of SmolLM2: byte-level BPE, digits alone, nothing added around a text, pad = eos."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """In the manner of Llama-2: "▁" for a blank and before every text, byte fallback, <s> in front."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trained.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    assert len(pieces) <= VOCAB_SIZE

    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\n"), behavior="isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    return make_tiny_llama()


@pytest.fixture
def tiny_llama_factory():
    """The function itself, for tests that vary tie, num_kv_heads, or anything in LlamaConfig."""
    return make_tiny_llama


@pytest.fixture
def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    return make_byte_level_tokenizer()


@pytest.fixture
def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    return make_sentencepiece_tokenizer()
