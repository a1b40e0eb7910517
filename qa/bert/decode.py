"""A data set's start and end scores in, the n best answers of every question out, as text with a confidence.

    confidence(s, e) = exp(score(s, e)) / Z
    Z                = sum of exp(score) over the legal spans of all windows, in v2.0 plus exp(null score)

That is one probability for every (window, start, end): all of them, and "no answer", sum to 1. Where overlapping
windows give the same characters, the candidate has the largest of their confidences, not the sum: so candidates stand
in the order of score and confidence alike, and an answer does not gain by lying where two windows overlap.

Input: bert/reader.py's scores, in the flat arrays of windows.py. Used by: bert/reader.py.

N windows   T tokens of all windows   Q questions   K = num_best   M candidates of all questions
q, n: the questions and windows of one chunk
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qa.bert.spans import IMPOSSIBLE, NonFiniteScores, best_of_windows, null_scores
from qa.prediction import Candidate
from qa.training.precision import at_least_fp32

CHUNK_CELLS = 1 << 19  # scores and spans looked at in one chunk: tensors of about 1 MB, whatever the data's size


@dataclass(slots=True)
class Decoded:
    """What was found for one question."""

    candidates: list[Candidate]  # distinct character spans, best first; [] if the passage has no token
    null_score: float | None  # v2.0 only, as are the next two
    null_confidence: float | None
    no_answer_score: float | None  # null score - best score: "no answer" above a threshold. None: there is no candidate


@dataclass
class NBest(Sequence):
    """What was found for all questions, in flat arrays. `nbest[index]` makes text and objects of one question: for all
    at once, where not all are needed, they would cost several times what the search does.
    """

    contexts: list[str]  # Q
    start_char: np.ndarray  # [M] int32
    end_char: np.ndarray  # [M] int32, exclusive
    score: np.ndarray  # [M]
    confidence: np.ndarray  # [M]
    bounds: np.ndarray  # [Q + 1] question q has the candidates bounds[q]:bounds[q + 1], best first
    null_score: np.ndarray | None  # [Q], v2.0 only, as is the next
    null_confidence: np.ndarray | None  # [Q]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> Decoded:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part, context = slice(self.bounds[index], self.bounds[index + 1]), self.contexts[index]
        arrays = self.start_char, self.end_char, self.score, self.confidence
        candidates = [Candidate(context[span[0]:span[1]], *span)
                      for span in zip(*(array[part].tolist() for array in arrays), strict=True)]
        if self.null_score is None:
            return Decoded(candidates, None, None, None)
        null_score = float(self.null_score[index])
        no_answer_score = null_score - candidates[0].score if candidates else None
        return Decoded(candidates, null_score, float(self.null_confidence[index]), no_answer_score)


@torch.inference_mode()
def decode_flat(start: Tensor, end: Tensor, *, bounds: np.ndarray, passage: np.ndarray, offsets: np.ndarray,
                question: np.ndarray, contexts: list[str], num_best: int, max_answer_length: int,
                use_null: bool = False, null_token: np.ndarray | None = None) -> NBest:
    """Scores in the flat arrays of windows.py -> the `num_best` best distinct character spans of every question.

    Windows that overlap, and tokens that share a character, give the same characters more than once. They count once,
    at their best. A question that is thereby left with too few spans is searched again for twice as many, until there
    are enough or no more. So the n best distinct spans are exact, too: all spans better than the last one were seen.

    Args:
        start, end: [T] scores, on any device; half precision is raised to fp32.
        bounds, passage, offsets, question, null_token: as in `Windows`; positions count from the window's first token.
        contexts: [Q] the passage of each question; each question has at least one window.
        use_null: v2.0, where "no answer" takes part in the confidences.

    Raises:
        NonFiniteScores: NaN or infinity on a passage token (or on a null position, with `use_null`).
    """
    start, end = at_least_fp32(start.detach()), at_least_fp32(end.detach())
    first_window = np.searchsorted(question, np.arange(len(contexts) + 1))  # [Q + 1]
    assert (np.diff(first_window) > 0).all() and first_window[-1] == len(question), "a question without a window"
    first_token, length = bounds[:-1] + passage[:, 0], np.int64(passage[:, 1]) - passage[:, 0]  # [N]
    null_score = None
    if use_null:
        null_index, owner = (torch.from_numpy(np.int64(array)).to(start.device)
                             for array in (bounds[:-1] + null_token, question))
        null_score = null_scores(start[null_index] + end[null_index], owner, len(contexts)).cpu().numpy()
    start, end = _finite(start, end, bounds, first_token, length, question, null_score)

    windows = _FlatWindows(start, end, first_token, length, first_window, max_answer_length)
    start_char, end_char, score, count, log_normaliser = _search(windows, offsets, num_best)
    if use_null:
        log_normaliser = np.logaddexp(log_normaliser, null_score)
    confidence = np.exp(score - np.repeat(log_normaliser, count))
    return NBest(contexts, start_char, end_char, score, confidence, np.concatenate([[0], np.cumsum(count)]), null_score,
                 np.exp(null_score - log_normaliser) if use_null else None)


class _FlatWindows:
    """Takes chunks of windows out of the flat scores, each window cut down to its passage tokens."""

    def __init__(self, start: Tensor, end: Tensor, first_token: np.ndarray, length: np.ndarray,
                 first_window: np.ndarray, max_answer_length: int):
        self.longest = int(length.max(initial=1))
        margin = self.longest + max_answer_length
        self.start, self.end = F.pad(start, (0, margin)), F.pad(end, (0, margin))  # so each can be read at any width
        self.fence = F.pad(start.new_zeros(self.longest), (0, margin), value=IMPOSSIBLE)  # a slice of it masks a window
        self.first_token = first_token  # [N] first passage token, as an index into `start`
        self.length = length  # [N] passage tokens
        self.first_window = first_window  # [Q + 1]
        self.max_answer_length = max_answer_length

    def __len__(self) -> int:
        return len(self.first_window) - 1

    def chunks(self, questions: np.ndarray, num_spans: int) -> Iterator[np.ndarray]:
        """Cut questions into chunks of similar length; those of several windows, which must be merged, come apart."""
        num_windows = np.diff(self.first_window)
        longest = np.maximum.reduceat(self.length, self.first_window[:-1])  # [Q]
        for group in (questions[num_windows[questions] > 1], questions[num_windows[questions] == 1]):
            group = group[np.argsort(-longest[group], kind="stable")]
            total = np.cumsum(num_windows[group])
            begin = done = 0
            while begin < len(group):
                cells = int(longest[group[begin]]) + (1 + num_spans) * self.max_answer_length  # of one window
                stop = max(begin + 1, int(np.searchsorted(total, done + CHUNK_CELLS // cells, side="right")))
                yield group[begin:stop]
                begin, done = stop, total[stop - 1]

    def best_spans(self, questions: np.ndarray, num_spans: int) -> tuple[np.ndarray, ...]:
        """-> score, first and last token (indices into `start`), each [q, num_spans], and log normaliser [q]."""
        counts = self.first_window[questions + 1] - self.first_window[questions]
        local = np.repeat(np.arange(len(questions)), counts)  # [n] each window's question, counted from 0
        windows = np.arange(len(local)) + (self.first_window[questions] - np.cumsum(counts) + counts)[local]
        first, length, owner = (torch.from_numpy(array).to(self.start.device)
                                for array in (self.first_token[windows], self.length[windows], local))
        width = max(1, int(length.max()))
        fence = self.fence.unfold(0, width + self.max_answer_length - 1, 1).index_select(0, self.longest - length)
        start = self.start.unfold(0, width, 1).index_select(0, first).add_(fence[:, :width])
        end = self.end.unfold(0, fence.shape[1], 1).index_select(0, first).add_(fence)
        table = best_of_windows(start, end, owner, len(questions), num_spans, self.max_answer_length)
        first = first[table.window]
        columns = table.score, first + table.start_token, first + table.end_token, table.log_normaliser
        return tuple(column.cpu().numpy() for column in columns)


def _search(windows: _FlatWindows, offsets: np.ndarray, num_best: int) -> tuple[np.ndarray, ...]:
    """-> start characters, end characters, scores, each [M]; number of spans and log normaliser of a question, [Q]."""
    shape = len(windows), num_best
    start_char, end_char, score = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape)
    count, log_normaliser = np.zeros(len(windows), np.int64), np.zeros(len(windows))
    edges = offsets.reshape(-1)  # token t covers the characters edges[2 t]:edges[2 t + 1]
    pending, num_spans = np.arange(len(windows)), num_best
    while len(pending):
        unfinished = []
        for chunk in windows.chunks(pending, num_spans):
            found, first, last, log_normaliser[chunk] = windows.best_spans(chunk, num_spans)
            # "clip", because a span that is not valid may point behind the last token
            spans = edges.take(2 * first, mode="clip"), edges.take(2 * last + 1, mode="clip"), found  # [q, num_spans]
            start_char[chunk], end_char[chunk], score[chunk], count[chunk] = _distinct(*spans, num_best)
            more = found[:, -1] > IMPOSSIBLE  # the table is full
            unfinished.append(chunk[more & (count[chunk] < num_best)])
        pending, num_spans = np.concatenate(unfinished), 2 * num_spans
    real = np.arange(num_best) < count[:, None]
    return start_char[real], end_char[real], score[real], count, log_normaliser


def _finite(start: Tensor, end: Tensor, bounds: np.ndarray, first_token: np.ndarray, length: np.ndarray,
            question: np.ndarray, null_score: np.ndarray | None) -> tuple[Tensor, Tensor]:
    """The same scores, all finite: outside the passage, where no span uses them, made so; else an error."""
    if math.isfinite(float(start.sum() + end.sum())):
        return start, end
    broken = np.flatnonzero(~(start.isfinite() & end.isfinite()).cpu().numpy())  # tokens
    window = np.searchsorted(bounds, broken, side="right") - 1
    inside = (broken >= first_token[window]) & (broken < first_token[window] + length[window])
    questions = set(question[window[inside]].tolist())
    if null_score is not None:
        questions.update(np.flatnonzero(~np.isfinite(null_score)).tolist())
    if questions:
        raise NonFiniteScores(sorted(questions))
    return start.nan_to_num(), end.nan_to_num()


def _distinct(start_char: np.ndarray, end_char: np.ndarray, score: np.ndarray, num_best: int) -> tuple[np.ndarray, ...]:
    """The first `num_best` distinct spans of each row: the same columns, [q, K], and how many are real, [q]."""
    columns, valid = (start_char, end_char, score), score > IMPOSSIBLE
    key = np.where(valid, np.int64(start_char) << 32 | end_char, -1 - np.arange(valid.shape[1]))
    ordered = np.sort(key, axis=1)
    if (ordered[:, 1:] != ordered[:, :-1]).all():
        return *(column[:, :num_best] for column in columns), valid[:, :num_best].sum(axis=1)
    order = key.argsort(axis=1, kind="stable")
    ordered = np.take_along_axis(key, order, axis=1)
    fresh = np.ones_like(valid)
    np.put_along_axis(fresh, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
    valid &= fresh
    kept = np.argsort(~valid, axis=1, kind="stable")[:, :num_best]
    return *(np.take_along_axis(column, kept, axis=1) for column in columns), valid.sum(axis=1).clip(max=num_best)
