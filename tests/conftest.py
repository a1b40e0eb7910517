"""What many tests need: a tiny BERT in a folder, made offline with random weights, and small SQuAD documents.

    tiny_bert_folder                            a plain encoder and its tokenizer; copy it to change it
    small_squad, small_squad_v2                 official JSON as Python objects, new in every test
    small_squad_file, small_squad_v2_file       the same, in a file of the test's own

Each process computes in one thread, set before torch is imported: models of our size gain nothing from more, and the tests run
in as many processes as there are cores (pytest -n).
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from qa.data.demo import demo_squad

VOCAB_SIZE = 600
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # ids 0 to 4


def first_questions(split: str, v2: bool, num_articles: int, num_passages: int, num_questions: int) -> dict:
    """The first articles of the built-in data, of each the first passages, of these the first and last questions."""
    document = demo_squad(split, v2)
    articles = document["data"][:num_articles]
    for article in articles:
        article["paragraphs"] = article["paragraphs"][:num_passages]
        for paragraph in article["paragraphs"]:
            qas = paragraph["qas"]
            paragraph["qas"] = qas[:num_questions - 1] + qas[-1:]  # v2.0's unanswerable ones stand last
    return {"version": document["version"], "data": articles}


@pytest.fixture(scope="session")
def _documents() -> dict[bool, dict]:
    return {v2: first_questions("train", v2, num_articles=6, num_passages=2, num_questions=3) for v2 in (False, True)}


@pytest.fixture
def small_squad(_documents) -> dict:
    """v1.1: 6 articles of 2 passages of 3 questions, 36 in all."""
    return copy.deepcopy(_documents[False])


@pytest.fixture
def small_squad_v2(_documents) -> dict:
    """v2.0: the same passages; a third of the 36 questions has no answer."""
    return copy.deepcopy(_documents[True])


@pytest.fixture
def small_squad_file(small_squad, tmp_path) -> Path:
    return write_document(small_squad, tmp_path / "small-v1.1.json")


@pytest.fixture
def small_squad_v2_file(small_squad_v2, tmp_path) -> Path:
    return write_document(small_squad_v2, tmp_path / "small-v2.0.json")


def write_document(document: dict, path: Path) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def make_wordpiece_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """BERT's uncased tokenizer in all but its vocabulary, which is learnt from `texts`."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names,
                                   model_input_names=["input_ids", "token_type_ids", "attention_mask"])


@pytest.fixture(scope="session")
def tiny_bert_folder(tmp_path_factory, _documents) -> Path:
    """A plain encoder: 2 layers, 32 wide, 2 heads, 128 positions, a pooler, dropout 0.1; about 600 tokens."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    texts = [paragraph["context"] for article in _documents[True]["data"] for paragraph in article["paragraphs"]]
    texts += [qa["question"] for article in _documents[True]["data"] for paragraph in article["paragraphs"]
              for qa in paragraph["qas"]]
    tokenizer = make_wordpiece_tokenizer(texts)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=128, pad_token_id=0,
                        initializer_range=0.1)  # large enough that every token matters
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
