"""The model: transformers' encoder, BERT or one like it, and a span head of our own on every token.

    s = H w_s + b_s,   e = H w_e + b_e      scores of token t being the answer's first / last one
    loss = (-log softmax(s)[start] - log softmax(e)[end]) / 2            (Devlin et al. 2019, section 4.2)

transformers' `BertModel` computes the attention, softmax(Q K^T / sqrt(d)) V in each head of each layer. `load_bert`
replaces that one function by qa/cpu/attention.py, which is faster for training on a CPU, and dropout by qa/cpu/dropout.py.

The parameters have the names of transformers' `BertForQuestionAnswering` (`bert.*`, `qa_outputs.*`), so each loads the other's
files. What RoBERTa, DistilBERT and ELECTRA do otherwise is in qa/families.py. Used by: train_bert.py, qa/reader.py.

Letters: B windows, L tokens, H hidden size.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForQuestionAnswering, PreTrainedConfig, PreTrainedModel

from qa import weights
from qa.cpu import attention
from qa.cpu.dropout import replace_dropout
from qa.errors import UserError
from qa.families import FAMILIES, Family
from qa.training.precision import at_least_fp32
from qa.training.sharding import cut_like


class SpanHead(nn.Linear):
    """Two scores for every token: does the answer start here, does it end here? A linear map from H to 2."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 2)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [B, L, H] -> start scores [B, L], end scores [B, L], in at least fp32.

        Outside autocast: rounded to bf16's 8 bits, the scores of a question's best two spans often tie.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            scores = super().forward(at_least_fp32(hidden))  # [B, L, 2]
        return scores.unbind(dim=-1)


class BertSpanModel(nn.Module):
    """Encoder and head. Weights are loaded by `load_bert`, and saved by `save_bert`."""

    def __init__(self, encoder: PreTrainedModel, family: Family) -> None:
        super().__init__()
        self.config, self.family = encoder.config, family
        self.add_module(family.encoder, encoder)  # self.bert, self.roberta, ...
        self.qa_outputs = SpanHead(encoder.config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids, token_type_ids: int64 [B, L]; attention_mask: bool [B, L] -> start, end scores [B, L]."""
        visible = attention_mask[:, None, None, :]  # with 4 dimensions transformers takes it as it is: no question to the GPU
        segments = {"token_type_ids": token_type_ids} if self.family.has_segments else {}
        hidden = self.get_submodule(self.family.encoder)(input_ids, attention_mask=visible, **segments).last_hidden_state
        return self.qa_outputs(hidden)  # [B, L, H] -> 2 x [B, L]

    @property
    def widths(self) -> tuple[int, int]:
        """Of a token within the encoder, and inside a layer's MLP."""
        return self.config.hidden_size, getattr(self.config, self.family.name("intermediate_size"))

    @property
    def dropout(self) -> float:
        return getattr(self.config, self.family.name("hidden_dropout_prob"))


def span_loss(start: Tensor, end: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The loss above, (start cross-entropy + end cross-entropy) / 2, summed over the windows; a scalar.

    Padding is no candidate: a window's loss does not depend on what it is batched with. start, end: [B, L].
    """
    start = start.masked_fill(~batch["attention_mask"], -torch.inf)
    end = end.masked_fill(~batch["attention_mask"], -torch.inf)
    cross_entropy = nn.functional.cross_entropy
    return (cross_entropy(start, batch["start_token"], reduction="sum")
            + cross_entropy(end, batch["end_token"], reduction="sum")) / 2


def load_bert(folder: Path, max_length: int, dropout: float | None = None) -> tuple[BertSpanModel, bool]:
    """Load an encoder, or a question-answering checkpoint, in fp32, in training mode.

    Returns the model, and whether its head was trained (False: the head is new, drawn from torch's generator).

    Args:
        max_length: tokens of the windows to come; checked against the model's positions.
        dropout: probability for all dropout layers; None: as the checkpoint's config has it.

    Raises:
        UserError: another family, or weights that are missing or have no place.
    """
    weights.expect_reader(folder, "bert")
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # any type: transformers checks the values by a library of its own
        raise UserError(f"{folder}/config.json: {' '.join(str(error).split())[:200]}; copy it again") from None
    family = FAMILIES[config.model_type]
    if max_length > family.most_tokens(config):
        raise UserError(f"--max-length {max_length}: {folder} has positions for {family.most_tokens(config)} tokens; "
                        f"use at most that, long passages are cut into windows")
    config.num_labels = 2  # a base whose config says three labels would get a head with three outputs
    if dropout is not None:
        for word in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            setattr(config, family.name(word), dropout)
    loaded, head_is_new = _from_pretrained(folder, config, family)
    model = BertSpanModel(loaded.get_submodule(family.encoder), family)
    model.config.architectures = [type(loaded).__name__]
    with torch.no_grad():
        if head_is_new:  # as BERT initialises its own weights: N(0, 0.02), bias 0
            model.qa_outputs.weight.normal_(0.0, config.initializer_range)
            model.qa_outputs.bias.zero_()
        else:
            model.qa_outputs.load_state_dict(loaded.qa_outputs.state_dict())
    replace_dropout(model)
    return model.train(), not head_is_new


def save_bert(model: BertSpanModel, tokenizer, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Write what `AutoModelForQuestionAnswering.from_pretrained` and `AutoTokenizer.from_pretrained` load.

    tensors: the weights, if not all of them are in the model (training/sharding.py).
    """
    config = copy.deepcopy(model.config)
    config.dtype = "float32"
    config.save_pretrained(folder)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in (tensors or model.state_dict()).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def load_weights(model: BertSpanModel, tensors: dict[str, Tensor]) -> None:
    """Put whole weights, of a product or a checkpoint, back into the model."""
    own = model.state_dict()
    model.load_state_dict({name: cut_like(own[name], tensor) for name, tensor in tensors.items()})


def _from_pretrained(folder: Path, config: PreTrainedConfig, family: Family) -> tuple[PreTrainedModel, bool]:
    """Load the weights. Returns the model, and whether its span head is missing.

    Any other missing weight is an error, and so is a weight without a place, except the heads of pretraining.
    """
    try:
        loaded, info = AutoModelForQuestionAnswering.from_pretrained(
            folder, config=config, dtype=torch.float32, attn_implementation=attention.register(), output_loading_info=True,
            key_mapping={r"^(_orig_mod\.|module\.)+": ""}, use_safetensors=True,
            ignore_mismatched_sizes=True)  # a wrong shape is reported below
    except Exception as error:  # of transformers, safetensors, torch, for whatever is wrong with the files
        raise UserError(f"{folder}: its weights cannot be loaded ({' '.join(str(error).split())[:200]}); expected a "
                        "model.safetensors as save_pretrained writes it") from None
    missing, head = set(info["missing_keys"]), {"qa_outputs.weight", "qa_outputs.bias"}
    pretraining = ("pooler.", f"{family.encoder}.pooler.", *family.pretraining)  # the only weights that may be left behind
    unexpected = {key for key in info["unexpected_keys"] if not key.startswith(pretraining)}
    misshapen = {key for key, *_ in info["mismatched_keys"]}
    if missing - misshapen not in (set(), head) or unexpected or misshapen:
        raise UserError(f"{folder}: not a {family.model_type} encoder or {type(loaded).__name__} checkpoint with two labels; "
                        f"missing {sorted(missing - misshapen)[:3]}, without a place {sorted(unexpected)[:3]}, of another "
                        f"shape {sorted(misshapen)[:3]}")
    return loaded, bool(missing)
