"""The model against transformers' BertForQuestionAnswering, in both directions; the loss against three other ways."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)

from qa import weights
from qa.bert.model import BertSpanModel, load_bert, load_weights, save_bert, span_loss
from qa.bert.windows import make_windows
from qa.cpu.dropout import Dropout
from qa.data.squad import parse_squad
from qa.errors import UserError

SIZES = dict(vocab_size=600, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
             max_position_embeddings=128, initializer_range=0.1)


@pytest.fixture
def batch(tiny_bert_folder, small_squad) -> dict[str, torch.Tensor]:
    """8 windows of different lengths, with labels, padded."""
    windows = make_windows(parse_squad(small_squad, "small").passages, weights.load_tokenizer(tiny_bert_folder), 64, 16)
    batch = windows.batch(np.argsort(windows.lengths)[np.linspace(0, len(windows) - 1, 8).astype(int)], "cpu")
    assert not batch["attention_mask"].all() and batch["start_token"].any()
    return batch


def save(cls: type, folder: Path, seed: int = 0, **settings) -> Path:
    """A checkpoint of transformers with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cls(BertConfig(**SIZES, **settings)).save_pretrained(folder)
    return folder


def change_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def scores(model: BertSpanModel, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])


def transformers_scores(model: BertForQuestionAnswering, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    output = model(batch["input_ids"], attention_mask=batch["attention_mask"].long(),
                   token_type_ids=batch["token_type_ids"])
    return output.start_logits, output.end_logits


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert (found - expected).abs().max() <= relative * expected.abs().max()


# ---- logits and gradients --------------------------------------------------------------------------------------------

def test_logits_equal_transformers(batch, tmp_path):
    folder = save(BertForQuestionAnswering, tmp_path / "qa")
    model, head_is_trained = load_bert(folder, 128)
    assert head_is_trained and model.training
    model.eval()
    real = batch["attention_mask"]
    reference = BertForQuestionAnswering.from_pretrained(folder).eval()
    with torch.no_grad():
        for found, expected in zip(scores(model, batch), transformers_scores(reference, batch), strict=True):
            assert_close(found[real], expected[real], 1e-5)


def test_gradients_equal_transformers_in_fp64(batch, tmp_path):
    """In training mode, where attention takes its own path; with transformers' loss, on windows without padding."""
    folder = save(BertForQuestionAnswering, tmp_path / "qa")
    model = load_bert(folder, 128, dropout=0.0)[0].double()
    reference = BertForQuestionAnswering.from_pretrained(folder, attn_implementation="eager").double().eval()
    shortest = int(batch["attention_mask"].sum(1).min())
    cropped = {name: tensor[:, :shortest] if tensor.ndim == 2 else tensor.clamp(max=shortest - 1)
               for name, tensor in batch.items()}
    loss = span_loss(*scores(model, cropped), cropped) / len(batch["input_ids"])
    loss.backward()
    expected = reference(cropped["input_ids"], token_type_ids=cropped["token_type_ids"],
                         start_positions=cropped["start_token"], end_positions=cropped["end_token"]).loss
    expected.backward()
    assert abs(loss - expected) <= 1e-12 * expected
    gradients = dict(reference.named_parameters())
    assert gradients.keys() == dict(model.named_parameters()).keys()
    norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in gradients.values()))
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name].grad).norm() <= 1e-10 * norm, name


def test_scores_are_at_least_fp32(tiny_bert_folder, batch):
    model, _ = load_bert(tiny_bert_folder, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert [found.dtype for found in scores(model, batch)] == [torch.float32] * 2
    assert [found.dtype for found in scores(model.double(), batch)] == [torch.float64] * 2


# ---- the loss --------------------------------------------------------------------------------------------------------

def random_scores(shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(4 * torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(2))


def test_span_loss_by_hand(batch):
    start, end = random_scores(batch["input_ids"].shape)
    total = 0.0
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for table, label in ((start, batch["start_token"]), (end, batch["end_token"])):
            values = table[row, :length].tolist()
            total += (math.log(sum(map(math.exp, values))) - values[label[row]]) / 2
    assert float(span_loss(start, end, batch)) == pytest.approx(total, rel=1e-12)


def test_a_micro_batch_of_no_windows_adds_nothing_to_loss_and_gradient(tiny_bert_folder, small_squad):
    windows = make_windows(parse_squad(small_squad, "small").passages, weights.load_tokenizer(tiny_bert_folder), 64, 16)
    model, _ = load_bert(tiny_bert_folder, 64)
    nothing = windows.batch(np.array([], dtype=np.int64), "cpu")
    loss = span_loss(*scores(model, nothing), nothing)
    loss.backward()
    assert loss == 0 and all(not parameter.grad.any() for parameter in model.parameters())


def test_span_loss_does_not_see_padding(batch):
    start, end = (table.requires_grad_() for table in random_scores(batch["input_ids"].shape))
    loss = span_loss(start, end, batch)
    loss.backward()
    assert not start.grad[~batch["attention_mask"]].any() and not end.grad[~batch["attention_mask"]].any()
    with torch.no_grad():
        start[~batch["attention_mask"]], end[~batch["attention_mask"]] = 1e4, torch.nan
        assert torch.equal(span_loss(start, end, batch), loss)


def test_loss_of_a_window_does_not_depend_on_its_companions(tiny_bert_folder, batch):
    """The whole model: a batch's loss is the sum of its windows' own, in whatever cuts."""
    model = load_bert(tiny_bert_folder, 128, dropout=0.0)[0].double()
    whole = span_loss(*scores(model, batch), batch)
    for cuts in ([1] * 8, [3, 5]):
        parts = zip(*(tensor.split(cuts) for tensor in batch.values()), strict=True)
        total = 0.0
        for part in parts:
            part = dict(zip(batch, part, strict=True))
            longest = int(part["attention_mask"].sum(1).max())
            part = {name: tensor[:, :longest] if tensor.ndim == 2 else tensor for name, tensor in part.items()}
            total += span_loss(*scores(model, part), part).item()
        assert total == pytest.approx(whole.item(), rel=1e-12)


# ---- the product -----------------------------------------------------------------------------------------------------

def test_product_loads_in_transformers_with_the_same_logits(tiny_bert_folder, batch, tmp_path):
    model, head_is_trained = load_bert(tiny_bert_folder, 128)
    assert not head_is_trained
    tokenizer = weights.load_tokenizer(tiny_bert_folder)
    save_bert(model, tokenizer, tmp_path / "model")
    loaded, info = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert type(loaded) is BertForQuestionAnswering and not any(info.values()), info
    assert loaded.config.num_labels == 2 and loaded.dtype == torch.float32
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    real = batch["attention_mask"]
    with torch.no_grad():
        for found, expected in zip(scores(model.eval(), batch), transformers_scores(loaded.eval(), batch), strict=True):
            assert_close(found[real], expected[real], 1e-5)
    text = "When was the Calford Bridge opened?"
    assert AutoTokenizer.from_pretrained(tmp_path / "model")(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_weights_come_back_to_the_bit(tiny_bert_folder, tmp_path):
    model, _ = load_bert(tiny_bert_folder, 128)
    save_bert(model.double(), weights.load_tokenizer(tiny_bert_folder), tmp_path)
    again, head_is_trained = load_bert(tmp_path, 128)
    other, _ = load_bert(tiny_bert_folder, 128)
    load_weights(other, load_file(tmp_path / "model.safetensors"))
    assert head_is_trained
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, model.float().state_dict()[name])
        assert torch.equal(tensor, other.state_dict()[name])


# ---- what loads ------------------------------------------------------------------------------------------------------

def test_new_head_is_drawn_from_torchs_generator(tiny_bert_folder):
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(load_bert(tiny_bert_folder, 128)[0].qa_outputs)
    assert torch.equal(heads[0].weight, heads[1].weight) and not torch.equal(heads[0].weight, heads[2].weight)
    assert not heads[0].bias.any() and 0.05 < heads[0].weight.std() < 0.2  # N(0, initializer_range = 0.1)


def test_base_with_three_labels_gets_a_head_of_two(tmp_path):
    folder = save(BertModel, tmp_path / "three", num_labels=3)
    assert json.loads((folder / "config.json").read_text())["id2label"].keys() == {"0", "1", "2"}
    model, _ = load_bert(folder, 128)
    assert model.qa_outputs.weight.shape == (2, 32) and model.config.num_labels == 2


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM, BertForPreTraining, BertForQuestionAnswering])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_compile_and_ddp_are_stripped_and_pretraining_heads_dropped(cls, prefix, tmp_path):
    folder = save(cls, tmp_path / "base")
    expected = {name.removeprefix("bert."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    change_tensors(folder, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    model, head_is_trained = load_bert(folder, 128)
    assert head_is_trained == (cls is BertForQuestionAnswering)
    for name, tensor in model.bert.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    if head_is_trained:
        assert torch.equal(model.qa_outputs.weight, expected["qa_outputs.weight"])


def test_position_ids_of_older_checkpoints_are_no_surprise(tmp_path):
    folder = save(BertModel, tmp_path / "old")
    change_tensors(folder, lambda tensors: tensors | {"embeddings.position_ids": torch.arange(128)[None]})
    load_bert(folder, 128)


@pytest.mark.parametrize("dropout, expected", [(None, 0.1), (0.0, 0.0), (0.3, 0.3)])
def test_dropout_is_the_configs_or_the_given_one(tiny_bert_folder, dropout, expected):
    model, _ = load_bert(tiny_bert_folder, 128, dropout)
    found = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert len(found) >= 5 and all(type(module) is Dropout and module.p == expected for module in found)
    assert model.config.attention_probs_dropout_prob == expected


# ---- what is refused, in one line ------------------------------------------------------------------------------------

def assert_refused(folder: Path, *parts: str, max_length: int = 128) -> None:
    with pytest.raises(UserError) as error:
        load_bert(folder, max_length)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


@pytest.mark.parametrize("family", ["Deberta", "DebertaV2", "T5", "GPT2", "Mamba", "Llama"])
def test_checkpoint_of_another_family_is_refused_by_name(family, tmp_path):
    config = getattr(transformers, f"{family}Config")()
    config.save_pretrained(tmp_path)
    assert_refused(tmp_path, str(tmp_path), repr(config.model_type), "'bert'", "'roberta'", "'distilbert'", "'electra'")


def test_family_that_transformers_does_not_know_is_refused_by_name(tiny_bert_folder, tmp_path):
    config = json.loads((tiny_bert_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gert"}))
    assert_refused(tmp_path, "'gert'", "'bert'")


def test_unexpected_and_missing_weights_are_refused_by_name(tmp_path):
    assert_refused(save(BertForSequenceClassification, tmp_path / "classes"), "classifier")
    folder = save(BertModel, tmp_path / "more")
    change_tensors(folder, lambda tensors: tensors | {"adapter.weight": torch.zeros(3)})
    assert_refused(folder, "without a place", "adapter.weight")
    name = "encoder.layer.1.output.dense.weight"
    folder = save(BertModel, tmp_path / "fewer")
    change_tensors(folder, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    assert_refused(folder, "missing", name)
    folder = save(BertForQuestionAnswering, tmp_path / "half a head")
    change_tensors(folder, lambda tensors: {key: value for key, value in tensors.items() if key != "qa_outputs.bias"})
    assert_refused(folder, "not a bert encoder", "missing", "qa_outputs.bias")
    folder = save(BertModel, tmp_path / "shape")
    change_tensors(folder, lambda tensors: tensors | {name: torch.zeros(3, 3)})
    assert_refused(folder, "of another shape", name)
    assert_refused(save(BertForQuestionAnswering, tmp_path / "three labels", num_labels=3), "two labels", "qa_outputs")


def test_missing_and_damaged_weights_are_refused(tiny_bert_folder, tmp_path):
    shutil.copytree(tiny_bert_folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"no tensors" * 99)
    assert_refused(tmp_path / "damaged", "damaged", "*.safetensors have 990 bytes")
    (tmp_path / "damaged" / "model.safetensors").unlink()
    assert_refused(tmp_path / "damaged", "*.safetensors have 0 bytes")


def test_max_length_above_the_positions_is_refused(tiny_bert_folder):
    load_bert(tiny_bert_folder, 128)
    assert_refused(tiny_bert_folder, "--max-length 129", "128", max_length=129)
