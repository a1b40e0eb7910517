"""A passage is read once: rows that hold a passage and all of its questions.

SQuAD asks about five questions per passage. In a causal model the keys and values of a passage do not depend on the
question behind it, so one row serves them all, and each question sees the passage and itself only:

                     keys   passage   question 1   question 2
    token            query  P P P P   a a a        b b
    segment                 0 0 0 0   1 1 1        2 2
    position                0 1 2 3   4 5 6        4 5

    passage          P      causal
    question 1       a      sees all  causal
    question 2       b      sees all  -            causal

    query i may see key j  <=>  j <= i  and  (segment[j] == 0  or  segment[j] == segment[i])

So the loss is exactly that of one row per question, at about a third of the tokens. Positions restart behind the passage,
hence only passage + question + answer must fit the model's context, not the row. The answer's last token, its end, is
predicted but is no input. The rows of a batch stand behind each other in one flat sequence; attention.py keeps them apart.

Input: prompts from encode.py. Used by: train_llama.py (AnswerLoss), generate.py (the rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qa.data.batches import deal
from qa.llama.attention import Layout, use_packed_attention, visible
from qa.llama.encode import Piece, Prompt
from qa.training.precision import at_least_fp32

# B rows of a batch, L tokens of the longest, N answer tokens of a batch, H hidden size, V vocabulary


@dataclass(frozen=True)
class Row:
    piece: Piece
    prompts: list[Prompt]

    def num_tokens(self) -> int:
        return len(self.piece.ids) + sum(_num_tokens(prompt) for prompt in self.prompts)


def _num_tokens(prompt: Prompt) -> int:
    """Tokens behind the passage that are inputs: all but the answer's last."""
    return len(prompt.question_ids) + max(len(prompt.answer_ids) - 1, 0)


def micro_batches(prompts: Sequence[Prompt], num_instruction: int, micro_tokens: int) -> list[list[Row]]:
    """Cut questions into micro-batches of rows; B * L <= micro_tokens in each, or it is one row with one question.

    The questions of a passage share a row, or the fewest rows that hold them. Rows of like length come together, the
    longest micro-batch first (so that memory, if it runs out, does so at once). `num_instruction`: tokens before the passage.
    """
    by_piece: dict[Piece, list[Prompt]] = {}
    for prompt in prompts:
        by_piece.setdefault(prompt.piece, []).append(prompt)
    rows = [row for piece, group in by_piece.items() for row in _rows(piece, group, micro_tokens - num_instruction)]
    rows.sort(key=Row.num_tokens, reverse=True)
    batches: list[list[Row]] = []
    for row in rows:
        if not batches or (num_instruction + batches[-1][0].num_tokens()) * (len(batches[-1]) + 1) > micro_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def deal_rows(prompts: Sequence[Prompt], num_ranks: int, num_instruction: int, micro_tokens: int) -> list[list[list[Row]]]:
    """Give a global batch to the ranks, passage by passage, so that they finish together; then cut as `micro_batches`.

    Returns:
        For every rank a list of micro-batches; empty for a rank with nothing to do.
    """
    by_piece: dict[Piece, list[Prompt]] = {}
    for prompt in prompts:
        by_piece.setdefault(prompt.piece, []).append(prompt)
    groups = list(by_piece.values())
    lengths = np.array([num_instruction + Row(group[0].piece, group).num_tokens() for group in groups])
    everything = int(lengths.sum()) * len(groups)  # no cut here: a rank's share in one piece
    shares = deal(np.arange(len(groups)), lengths, num_ranks, everything)
    dealt = [[prompt for indices in share for index in indices for prompt in groups[index]] for share in shares]
    return [micro_batches(prompts, num_instruction, micro_tokens) for prompts in dealt]


def _rows(piece: Piece, prompts: list[Prompt], max_tokens: int) -> list[Row]:
    """Fill one row after another."""
    rows = [Row(piece, [])]
    for prompt in prompts:
        if rows[-1].prompts and rows[-1].num_tokens() + _num_tokens(prompt) > max_tokens:
            rows.append(Row(piece, []))
        rows[-1].prompts.append(prompt)
    return rows


@dataclass
class Batch:
    """Rows as one flat sequence of T tokens, without padding. `prompts`: the questions in order; ids for messages."""

    prompts: list[Prompt]
    layout: Layout  # which row each token stands in
    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    segments: Tensor  # [T] int64: 0 instruction and passage; 1, 2, ... a row's questions
    predicting: Tensor  # [N] int64: the tokens at which an answer token is predicted, those before it
    targets: Tensor  # [N] int64: these answer tokens

    def to(self, device: torch.device | str) -> Batch:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | Layout)}
        return replace(self, **moved)


def collate(rows: Sequence[Row], instruction_ids: list[int], instruction_is_cached: bool = False) -> Batch:
    """Lay rows out as tensors. In decoding, where answers are empty, `predicting` has the last token of every cue.

    instruction_is_cached: the instruction itself is left out, and positions begin behind it.
    """
    shown_instruction = [] if instruction_is_cached else instruction_ids
    of_row, ids, positions, segments, predicting = [], [], [], [], []
    for number, row in enumerate(rows):
        begin = len(ids)
        num_shared = len(instruction_ids) + len(row.piece.ids)
        ids += shown_instruction + row.piece.ids
        positions += range(num_shared - (len(ids) - begin), num_shared)
        segments += [0] * (len(ids) - begin)
        for segment, prompt in enumerate(row.prompts, start=1):
            tail = prompt.question_ids + prompt.answer_ids[:-1]
            ids += tail
            positions += range(num_shared, num_shared + len(tail))
            segments += [segment] * len(tail)
            predicting += range(len(ids) - max(len(prompt.answer_ids), 1), len(ids))
        of_row += [number] * (len(ids) - begin)
    prompts = [prompt for row in rows for prompt in row.prompts]
    targets = [id for prompt in prompts for id in prompt.answer_ids]
    tensors = (torch.tensor(values, dtype=torch.int64) for values in (ids, positions, segments, predicting, targets))
    return Batch(prompts, Layout.from_rows(torch.tensor(of_row), len(rows)), *tensors)


class AnswerLoss(nn.Module):
    """-sum log P(answer token | all before it), over a batch's answer tokens.

    A module, so that the loss is one `forward`: DistributedDataParallel(AnswerLoss(model)) sees all of it, which it does
    not where a part of the wrapped model is called.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        use_packed_attention(model)
        self.model = model  # LlamaForCausalLM

    def forward(self, batch: Batch) -> Tensor:
        """The sum, a scalar in at least fp32; `len(batch.targets)` is the number of its terms."""
        segments = batch.layout.spread(batch.segments, fill=-1)  # [B, L]
        hidden = self.model.model(
            input_ids=batch.input_ids[None], position_ids=batch.positions[None], attention_mask=visible(segments, segments),
            layout=batch.layout, use_cache=False,
        ).last_hidden_state[0]  # [T, H]
        logits = self.model.lm_head(hidden[batch.predicting])  # [N, V], never [T, V]
        return cross_entropy(at_least_fp32(logits), batch.targets, reduction="sum")
