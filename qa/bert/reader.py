"""BERT as a reader: a data set's questions in, spans of their passages out.

    SquadData -> windows -> start and end scores of every token -> the best spans -> Prediction

The model reads the longest windows first: then the windows of a batch are alike in length, and little is padded. The scores go
to their places in flat arrays, so the order changes nothing. Each rank scores its share, and every rank gets all scores.
Used by: train_bert.py (held-out and final scores), qa/reader.py.

T tokens of all windows together
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qa.bert.decode_fast import find_candidates, make_predictions
from qa.bert.windows import Windows, make_windows
from qa.data.batches import cut
from qa.data.squad import SquadData
from qa.errors import UserError
from qa.prediction import Answered
from qa.settings import ReadSettings
from qa.training.distributed import Runtime, sum_over_ranks
from qa.training.precision import Precision


@dataclass
class BertReader:
    model: nn.Module  # BertSpanModel, or what torch.compile made of it
    tokenizer: Any
    settings: ReadSettings
    precision: Precision
    runtime: Runtime
    micro_tokens: int  # padded tokens in a batch

    def answer(self, data: SquadData) -> Answered:
        """Predict every question of `data`.

        Raises:
            UserError: the model's scores are not finite; names the first question.
        """
        settings = self.settings
        windows = make_windows(data.passages, self.tokenizer, settings.max_length, settings.overlap)
        start, end = window_scores(self.model, windows, self.micro_tokens, self.precision, self.runtime)
        check_finite(start + end, windows, data)
        candidates = find_candidates(start, end, windows, settings.num_best, settings.max_answer_length,
                                     settings.may_refuse(data))
        return Answered(make_predictions(candidates, data), windows.summary.lines(), {"windows": len(windows)})


def check_finite(scores: Tensor, windows: Windows, data: SquadData) -> None:
    """Refuse a model whose scores are not numbers, with the first question of which they are. scores: [T]."""
    broken = np.flatnonzero(~scores.isfinite().cpu().numpy())
    if len(broken):
        rows = np.searchsorted(windows.bounds, broken, side="right") - 1
        questions = np.unique(windows.example_index[rows])
        raise UserError(f"the model's scores are NaN or infinite for {len(questions)} questions, the first being "
                        f"{data.examples[questions[0]].id!r}; try --precision fp32, and check the checkpoint's training log")


@torch.inference_mode()
def window_scores(model: nn.Module, windows: Windows, micro_tokens: int, precision: Precision,
                  runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Start and end score of every token, in at least fp32: two tensors [T] on the runtime's device."""
    was_training = model.training
    model.eval()
    lengths = windows.lengths
    longest_first = np.argsort(-lengths, kind="stable")
    micro_batches = cut(longest_first, lengths, micro_tokens)
    dtype = torch.float64 if precision.name == "fp64" else torch.float32
    flat = torch.zeros(2, len(windows.tokens), dtype=dtype, device=runtime.device)
    for rows in micro_batches[runtime.rank::runtime.num_ranks]:
        batch = windows.batch(rows, runtime.device)
        with precision.autocast():
            start, end = model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])  # [B, L]
        column = torch.arange(start.shape[1], device=runtime.device)
        first = torch.from_numpy(windows.bounds[rows]).to(runtime.device)
        places = (first[:, None] + column)[batch["attention_mask"]]  # [tokens of the batch]
        flat[0, places] = start[batch["attention_mask"]].to(dtype)
        flat[1, places] = end[batch["attention_mask"]].to(dtype)
    model.train(was_training)
    return tuple(sum_over_ranks(flat, runtime))  # every place was filled by one rank and is 0 on the others
