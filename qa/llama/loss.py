"""The loss of LLaMA: -sum log P(answer token | all before it), over the answer tokens alone.

`plain_answer_loss` is the definition: the library's model reads one question at a time. `AnswerLoss` trains: it reads the
packed rows of packing.py, each passage once. Both give the same loss and gradient (tests/llama/test_packing.py).

One step cannot be seen here: `hidden_states` gives LlamaModel an argument that it does not know, `layout`, and transformers
hands it on to `packed_attention` in attention.py.

Letters: B rows of a micro-batch, L tokens of the longest, T tokens of all, N answer tokens of the micro-batch, H hidden size,
V vocabulary. Used by: train_llama.py; exactness.py (`hidden_states`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qa.llama.attention import for_query_heads, use_packed_attention, visible
from qa.llama.encode import Prompt
from qa.llama.packing import MicroBatch
from qa.training.precision import at_least_fp32


def plain_answer_loss(model: nn.Module, prompts: Sequence[Prompt], instruction_ids: list[int]) -> Tensor:
    """The sum over the prompts' answer tokens, one question at a time: no packing, no mask or positions of ours."""
    loss = torch.zeros((), device=model.device)
    for prompt in prompts:
        ids = torch.tensor(instruction_ids + prompt.piece.ids + prompt.question_ids + prompt.answer_ids, device=model.device)
        begin = len(ids) - len(prompt.answer_ids)
        logits = model(ids[None], use_cache=False).logits[0]  # [L, V]; those at place i predict token i + 1
        loss = loss + cross_entropy(at_least_fp32(logits[begin - 1 : -1]), ids[begin:], reduction="sum")
    return loss


def hidden_states(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
    """The packed rows, read by the whole model but its head: [T, H]."""
    segments = micro_batch.layout.spread(micro_batch.segments, fill=-1)  # [B, L]
    return model.model(
        input_ids=micro_batch.input_ids[None], position_ids=micro_batch.positions[None],
        attention_mask=for_query_heads(visible(segments, segments), model), layout=micro_batch.layout, use_cache=False,
    ).last_hidden_state[0]


class AnswerLoss(nn.Module):
    """The same sum, over a micro-batch of packed rows.

    A module with one `forward`, so that torch.compile gets the model, the language-model head and the loss together.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        use_packed_attention(model)
        self.model = model  # LlamaForCausalLM

    def forward(self, micro_batch: MicroBatch) -> Tensor:
        """The sum, a scalar in at least fp32; `len(micro_batch.targets)` is the number of its terms."""
        hidden = hidden_states(self.model, micro_batch)  # [T, H]
        logits = self.model.lm_head(hidden[micro_batch.predicting])  # [N, V], never [T, V]
        return cross_entropy(at_least_fp32(logits), micro_batch.targets, reduction="sum")
