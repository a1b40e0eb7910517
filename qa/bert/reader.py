"""BERT as a reader: a data set's questions in, spans of their passages out.

    SquadData -> windows -> start and end scores of every token -> the best spans -> Prediction

decode.py explains the last step, decode_fast.py does it. `settings` (qa/settings.py) has the lengths.

The model reads the longest windows first: then the windows of a batch are alike in length, and little is padded. The scores go
to their places in flat arrays, so the order changes nothing. Each rank scores its share, and every rank gets all scores.
Used by: training/evaluator.py (for train_bert.py), qa/reader.py.

Letters: T tokens of all windows together, B windows of a batch, L tokens of the longest of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qa.asking import Asked
from qa.bert.decode_fast import IMPOSSIBLE, find_candidates, make_predictions
from qa.bert.windows import Windows, make_windows, max_question_tokens, num_special_tokens
from qa.data.batches import cut
from qa.data.squad import SquadData
from qa.errors import UserError
from qa.prediction import Answered
from qa.settings import ReadSettings
from qa.training.distributed import Runtime, sum_over_ranks
from qa.training.precision import Precision
from qa.training.sharding import in_step


@dataclass
class BertReader(Asked):
    model: nn.Module  # BertSpanModel, or what torch.compile made of it
    tokenizer: Any
    settings: ReadSettings
    precision: Precision
    runtime: Runtime
    micro_tokens: int  # most tokens of a batch, padding included

    def answer(self, data: SquadData) -> Answered:
        """Predict every question of `data`. Raises UserError if a score is not finite."""
        settings = self.settings
        windows = make_windows(data.passages, self.tokenizer, settings.max_length, settings.overlap)
        scores = self._window_scores(windows)  # [2, T]
        check_finite(scores.sum(dim=0), windows, data)
        blanks = torch.from_numpy(windows.blanks).to(scores.device)
        start, end = scores.index_fill(1, blanks, IMPOSSIBLE)  # no answer begins or ends with a blank
        longest = min(settings.max_answer_length, settings.max_length)
        num_spans = longest * settings.max_length * int(np.bincount(windows.example_index).max())  # no question has more
        num_best = min(settings.num_best, num_spans)
        candidates = find_candidates(start, end, windows, num_best, longest, settings.may_refuse(data))
        return Answered(make_predictions(candidates, data), windows.summary.lines(), conditions={"windows": len(windows)})

    def for_asking(self, num_best: int, decode: str, may_refuse: bool | None) -> BertReader:
        is_v2 = self.settings.is_v2 if may_refuse is None else may_refuse
        return replace(self, settings=replace(self.settings, num_best=num_best, is_v2=bool(is_v2)))

    def count_question(self, question: str) -> tuple[int, int]:
        return (len(self.tokenizer.backend_tokenizer.encode(question, add_special_tokens=False).ids),
                max_question_tokens(self.settings.max_length, self.settings.overlap, num_special_tokens(self.tokenizer)))

    @torch.inference_mode()
    def _window_scores(self, windows: Windows) -> Tensor:
        """[2, T] start and end score of every token, in the type of the parameters."""
        device, was_training = self.runtime.device, self.model.training
        self.model.eval()
        longest_first = np.argsort(-windows.lengths, kind="stable")
        micro_batches = cut(longest_first, windows.lengths, self.micro_tokens)
        flat = torch.zeros(2, len(windows.tokens), dtype=self.precision.parameter_dtype, device=device)
        with in_step(self.model, self.runtime):
            for rows in micro_batches[self.runtime.rank::self.runtime.num_ranks]:
                batch = windows.batch(rows, device)
                real = batch["attention_mask"]  # [B, L]
                with self.precision.autocast():
                    scores = torch.stack(self.model(batch["input_ids"], real, batch["token_type_ids"]))  # [2, B, L]
                first_token = torch.from_numpy(windows.bounds[rows]).to(device)
                places = first_token[:, None] + torch.arange(real.shape[1], device=device)  # [B, L]
                flat[:, places[real]] = scores[:, real]
        self.model.train(was_training)
        return sum_over_ranks(flat, self.runtime)  # every place was filled by one rank and is 0 on the others


def check_finite(scores: Tensor, windows: Windows, data: SquadData) -> None:
    """If a score is NaN or infinite, raise a UserError that names the first such question. scores: [T]."""
    broken = np.flatnonzero(~scores.isfinite().cpu().numpy())
    if len(broken):
        rows = np.searchsorted(windows.bounds, broken, side="right") - 1
        questions = np.unique(windows.example_index[rows])
        raise UserError(f"the model's scores are NaN or infinite for {len(questions)} questions, the first being "
                        f"{data.examples[questions[0]].id!r}; try --precision fp32, and check the checkpoint's training log")
