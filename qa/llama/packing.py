"""A passage is read once: rows that hold a passage and questions about it.

SQuAD asks about five questions per passage. In a causal model a passage's keys and values do not depend on the question
after it. So one row serves them all, and each question sees the passage and itself only:

                            passage   question 1   question 2
    token                   P P P P   a a a        b b
    segment                 0 0 0 0   1 1 1        2 2
    position                0 1 2 3   4 5 6        4 5

    P sees                  causal
    a sees                  all       causal
    b sees                  all       -            causal

    query i may see key j  <=>  j <= i  and  (segment[j] == 0  or  segment[j] == segment[i])

So the loss is exactly that of one row per question, at about a third of the tokens. Positions restart after the passage:
passage + question + answer must fit the model's context, the row need not. The model predicts the answer's last token, its
end, but does not read it. The rows of a micro-batch follow each other in one flat sequence; attention.py keeps them apart.

Input: prompts from encode.py. Used by: train_llama.py, loss.py, reading.py.

Letters: B rows of a micro-batch, L tokens of the longest, T tokens of all, N answer tokens of the micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qa.data.batches import deal
from qa.llama.attention import Layout
from qa.llama.encode import Piece, Prompt


@dataclass(frozen=True)
class Row:
    piece: Piece
    prompts: list[Prompt]

    def num_tokens(self) -> int:
        return len(self.piece.ids) + sum(_num_own_tokens(prompt) for prompt in self.prompts)


def _num_own_tokens(prompt: Prompt) -> int:
    """Tokens after the passage that the model reads: all but the answer's last."""
    return len(prompt.question_ids) + max(len(prompt.answer_ids) - 1, 0)


def _make_rows(prompts: Sequence[Prompt], max_tokens: float = math.inf) -> list[Row]:
    """Each passage's questions, in order, in few rows. A row has at most `max_tokens` tokens, or a single question."""
    rows: dict[Piece, list[Row]] = {}
    for prompt in prompts:
        same_passage = rows.setdefault(prompt.piece, [])
        if not same_passage or same_passage[-1].num_tokens() + _num_own_tokens(prompt) > max_tokens:
            same_passage.append(Row(prompt.piece, []))
        same_passage[-1].prompts.append(prompt)
    return [row for same_passage in rows.values() for row in same_passage]


def micro_batches(prompts: Sequence[Prompt], num_instruction: int, micro_tokens: int) -> list[list[Row]]:
    """Cut questions into micro-batches of rows; B * L <= micro_tokens in each, or it is one row with one question.

    The questions of a passage share a row, or the fewest rows that hold them. Rows of like length come together, the longest
    micro-batch first: if memory runs out, it does so at once. `num_instruction`: tokens before the passage.
    """
    batches: list[list[Row]] = []
    for row in sorted(_make_rows(prompts, micro_tokens - num_instruction), key=Row.num_tokens, reverse=True):
        if not batches or (num_instruction + batches[-1][0].num_tokens()) * (len(batches[-1]) + 1) > micro_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def deal_rows(prompts: Sequence[Prompt], num_ranks: int, num_instruction: int, micro_tokens: int,
              even: bool = False) -> list[list[list[Row]]]:
    """Give a global batch to the ranks, passage by passage, so that they finish together; `micro_batches` then cuts each share.

    Returns every rank's list of micro-batches; empty for a rank with nothing to do. If `even`, all lists are equally long: they
    are filled up with a row of one token and no question, which adds 0 to loss and gradient.
    """
    rows = _make_rows(prompts)
    lengths = np.array([num_instruction + row.num_tokens() for row in rows])
    no_cut = int(lengths.sum()) * len(rows)  # a bound so high that `deal` leaves each rank's share uncut
    shares = deal(np.arange(len(rows)), lengths, num_ranks, no_cut)
    dealt = [[prompt for numbers in share for number in numbers for prompt in rows[number].prompts] for share in shares]
    shares = [micro_batches(prompts, num_instruction, micro_tokens) for prompts in dealt]
    most, nothing = max(map(len, shares)) if even else 0, [Row(Piece(prompts[0].piece.ids[:1], "", 0), [])]
    return [share + [nothing] * (most - len(share)) for share in shares]


@dataclass
class MicroBatch:
    """Rows as one flat sequence of T tokens, without padding. `prompts`: the questions, in the sequence's order."""

    prompts: list[Prompt]
    layout: Layout  # which row each token is in
    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    segments: Tensor  # [T] int64: 0 instruction and passage; 1, 2, ... a row's questions
    predicting: Tensor  # [N] int64: places in the sequence; the token there predicts the next token, which is an answer token
    targets: Tensor  # [N] int64: these answer tokens

    def to(self, device: torch.device | str) -> MicroBatch:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | Layout)}
        return replace(self, **moved)


def collate(rows: Sequence[Row], instruction_ids: list[int], instruction_is_cached: bool = False) -> MicroBatch:
    """Lay rows out as tensors. In decoding, where answers are empty, `predicting` has the last token of every cue.

    instruction_is_cached: the instruction itself is left out, and positions begin after it.
    """
    row_numbers, ids, positions, segments, predicting = [], [], [], [], []
    first_position = len(instruction_ids) if instruction_is_cached else 0
    for number, row in enumerate(rows):
        shared, begin = instruction_ids + row.piece.ids, len(ids)
        ids += shared[first_position:]
        positions += range(first_position, len(shared))
        segments += [0] * (len(shared) - first_position)
        for segment, prompt in enumerate(row.prompts, start=1):
            own = prompt.question_ids + prompt.answer_ids[:-1]
            ids += own
            positions += range(len(shared), len(shared) + len(own))
            segments += [segment] * len(own)
            predicting += range(len(ids) - max(len(prompt.answer_ids), 1), len(ids))
        row_numbers += [number] * (len(ids) - begin)
    prompts = [prompt for row in rows for prompt in row.prompts]
    targets = [id for prompt in prompts for id in prompt.answer_ids]
    tensors = (torch.tensor(values, dtype=torch.int64) for values in (ids, positions, segments, predicting, targets))
    return MicroBatch(prompts, Layout.from_rows(torch.tensor(row_numbers), len(rows)), *tensors)
