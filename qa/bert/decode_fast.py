"""Skip on first reading; same result as decode.py, for a whole data set at once and much faster.

decode.py sorts all legal spans. Here only a few are looked at, and the K best are found all the same:

    best[s] = start[s] + max(end[s], ..., end[s + D - 1])      the best span that starts at s
    1. Keep the K starts with the largest best[s]. A span that starts elsewhere is beaten by these K spans already.
    2. Cut the D ends of each of these starts into blocks of G ends. For the same reason, keep the K blocks whose best span is
       largest.
    3. Sort the K G spans that are left.

(The usual post-processing pairs the 20 best starts with the 20 best ends. Each is chosen without a look at the other, so it can
miss spans.) Different spans may have the same characters, and such spans count once. If a question has too few candidates
for that reason, it is searched again for twice as many spans.

Questions of similar length are searched together, as one chunk. Questions of several windows, whose spans must be joined, go
in chunks of their own. Used by: bert/reader.py.

Letters: Q questions, T tokens of all windows, M candidates of all questions, D = max_answer_length, K spans searched for,
k = K, or fewer if a window has fewer; q questions and n windows of one chunk, W the most passage tokens in one of these
windows, G ends in a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qa.bert.decode import make_prediction
from qa.bert.windows import NO_ANSWER, Windows
from qa.data.squad import SquadData
from qa.prediction import Candidate, Prediction

IMPOSSIBLE = float("-inf")  # the score of a span that is not legal
CHUNK_CELLS = 1 << 19  # scores and spans of one chunk: tensors of about 1 MB, whatever the data's size
MAX_GAP = 40.0  # exp(-40) is 4e-18; fp32 underflows at 1e-38


@dataclass
class FlatCandidates:
    """The candidates of all questions. Question number q has those in the slice bounds[q]:bounds[q + 1], best first."""

    bounds: np.ndarray  # [Q + 1]
    start_char: np.ndarray  # [M] int32
    end_char: np.ndarray  # [M] int32, exclusive
    score: np.ndarray  # [M]
    confidence: np.ndarray  # [M]
    null_score: np.ndarray  # [Q]
    null_confidence: np.ndarray | None  # [Q], v2.0 only


def make_predictions(found: FlatCandidates, data: SquadData) -> list[Prediction]:
    """With text and id, in the order of `data.examples`."""
    questions = [(example.id, passage.text) for passage in data.passages for example in passage.examples]
    columns = [column.tolist() for column in (found.start_char, found.end_char, found.score, found.confidence)]
    predictions = []
    for index, (question_id, text) in enumerate(questions):
        part = slice(found.bounds[index], found.bounds[index + 1])
        spans = zip(*(column[part] for column in columns), strict=True)
        candidates = [Candidate(text[span[0]:span[1]], *span) for span in spans]
        null_confidence = None if found.null_confidence is None else float(found.null_confidence[index])
        predictions.append(make_prediction(question_id, candidates, float(found.null_score[index]), null_confidence))
    return predictions


@torch.inference_mode()
def find_candidates(start: Tensor, end: Tensor, windows: Windows, num_best: int, max_answer_length: int,
                    use_null: bool) -> FlatCandidates:
    """The `num_best` best candidates of every question. start, end: [T] scores, in at least fp32, or IMPOSSIBLE."""
    start, end = start.cpu(), end.cpu()
    num_questions = int(windows.example_index[-1]) + 1
    first_window = np.searchsorted(windows.example_index, np.arange(num_questions + 1))  # [Q + 1]
    assert (np.diff(first_window) > 0).all(), "a question without a window"
    search = _Search(start, end, windows, first_window, max_answer_length)
    log_z, found = np.zeros(num_questions), []
    pending, num_spans = np.arange(num_questions), num_best
    while len(pending):
        unfinished = []
        for questions in search.chunks(pending, num_spans):
            score, start_char, end_char, log_z[questions] = search.best_spans(questions, num_spans)
            distinct = (score > IMPOSSIBLE) & _first_of_equals(start_char, end_char)  # [q, K]
            distinct &= distinct.cumsum(axis=1) <= num_best
            again = (score[:, -1] > IMPOSSIBLE) & (distinct.sum(axis=1) < num_best)  # [q] there may be more spans
            unfinished.append(questions[again])
            row, column = np.nonzero(distinct & ~again[:, None])
            found.append((questions[row], start_char[row, column], end_char[row, column], np.float64(score[row, column])))
        pending, num_spans = np.concatenate(unfinished), 2 * num_spans
    question, start_char, end_char, score = map(np.concatenate, zip(*found, strict=True))
    order = np.argsort(question, kind="stable")
    question, score = question[order], score[order]
    cls_token = windows.bounds[:-1] + NO_ANSWER
    null_score = np.minimum.reduceat((start[cls_token] + end[cls_token]).numpy(), first_window[:-1])
    if use_null:
        log_z = np.logaddexp(log_z, null_score)
    null_confidence = np.exp(null_score - log_z) if use_null else None
    return FlatCandidates(np.searchsorted(question, np.arange(num_questions + 1)), start_char[order], end_char[order], score,
                          np.exp(score - log_z[question]), null_score, null_confidence)


class _Search:
    """The best spans of some questions, as one chunk. The flat scores are read at each window's first passage token."""

    def __init__(self, start: Tensor, end: Tensor, windows: Windows, first_window: np.ndarray, max_answer_length: int):
        self.first_token = windows.bounds[:-1] + windows.passage_range[:, 0]  # [N] an index into `start`
        self.length = np.diff(windows.passage_range)[:, 0].astype(np.int64)  # [N] passage tokens
        margin = int(self.length.max(initial=1)) + max_answer_length  # lets the last window be read at the width of any other
        self.start, self.end = F.pad(start, (0, margin)), F.pad(end, (0, margin))
        self.start_char, self.end_char = np.pad(windows.offsets.T, ((0, 0), (0, margin)))
        self.first_window, self.num_windows = first_window[:-1], np.diff(first_window)  # [Q]
        self.max_answer_length = max_answer_length

    def chunks(self, questions: np.ndarray, num_spans: int) -> Iterator[np.ndarray]:
        """Cut questions into chunks of similar length, apart for one window and for several."""
        longest = np.maximum.reduceat(self.length, self.first_window)  # [Q]
        several = self.num_windows[questions] > 1
        for group in (questions[several], questions[~several]):
            group = group[np.argsort(-longest[group], kind="stable")]
            total = np.cumsum(self.num_windows[group])
            begin = done = 0
            while begin < len(group):
                cells = int(longest[group[begin]]) + (1 + num_spans) * self.max_answer_length  # of one window
                stop = max(begin + 1, int(np.searchsorted(total, done + CHUNK_CELLS // cells, side="right")))
                yield group[begin:stop]
                begin, done = stop, total[stop - 1]

    def best_spans(self, questions: np.ndarray, num_spans: int) -> tuple[np.ndarray, ...]:
        """-> score (IMPOSSIBLE: there are no more spans), start and end character, each [q, K], best first; log Z [q]."""
        first_window, counts = self.first_window[questions], self.num_windows[questions]
        owner = np.repeat(np.arange(len(questions)), counts)  # [n] each window's question, counted from 0
        first_row = np.cumsum(counts) - counts  # [q] each question's first window, counted from 0
        rows = np.arange(len(owner)) + (first_window - first_row)[owner]  # [n]
        first_token, width = torch.from_numpy(self.first_token[rows]), max(1, int(self.length[rows].max()))
        outside = torch.arange(width + self.max_answer_length - 1) >= torch.from_numpy(self.length[rows])[:, None]
        start, end = (scores.unfold(0, mask.shape[1], 1).index_select(0, first_token).masked_fill_(mask, IMPOSSIBLE)
                      for scores, mask in ((self.start, outside[:, :width]), (self.end, outside)))
        score, start_token, end_token = _best_in_window(start, end, num_spans, self.max_answer_length)  # [n, K]
        log_sum = _log_sum_of_spans(start, end, self.max_answer_length, score[:, 0])  # [n]
        score, first_token = score.numpy(), first_token[:, None]
        spans = (score, self.start_char[(first_token + start_token).numpy()], self.end_char[(first_token + end_token).numpy()])
        if len(rows) > len(questions):
            order = np.lexsort((-score.reshape(-1), np.repeat(owner, num_spans)))  # stable: ties stay in the windows' order
            best = order[first_row[:, None] * num_spans + np.arange(num_spans)]  # [q, K]
            spans = tuple(column.reshape(-1)[best] for column in spans)
            log_sum = _log_sum_by_question(log_sum, torch.from_numpy(owner), len(questions))
        return *spans, log_sum.numpy()


def _first_of_equals(start_char: np.ndarray, end_char: np.ndarray) -> np.ndarray:
    """[q, K] -> bool [q, K]: no column to the left has the same characters."""
    key = np.int64(start_char) << 32 | end_char
    order = key.argsort(axis=1, kind="stable")
    key = np.take_along_axis(key, order, axis=1)
    first = np.ones(key.shape, dtype=bool)
    np.put_along_axis(first, order[:, 1:], key[:, 1:] != key[:, :-1], axis=1)
    return first


def _best_in_window(start: Tensor, end: Tensor, num_spans: int, max_answer_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The three steps above: start [n, W], end [n, W + D - 1] -> score, start, end, each [n, K], best first."""
    block = next(g for g in range(math.isqrt(max_answer_length), 0, -1) if max_answer_length % g == 0)  # G
    num_blocks = max_answer_length // block
    block_best = F.max_pool1d(end, block, stride=1)  # [n, W + D - G]
    best = start + F.max_pool1d(block_best, num_blocks, stride=1, dilation=block)  # [n, W]

    starts = _largest(best, num_spans)  # [n, k]
    ends = starts[..., None] + torch.arange(0, max_answer_length, block)  # [n, k, D / G] the first end of each block
    starts, ends = starts[..., None].expand_as(ends).flatten(1), ends.flatten(1)
    chosen = _largest(start.gather(1, starts) + block_best.gather(1, ends), num_spans)
    starts, ends = starts.gather(1, chosen), ends.gather(1, chosen)  # [n, k]

    ends = ends[..., None] + torch.arange(block)  # [n, k, G]
    starts, ends = starts[..., None].expand_as(ends).flatten(1), ends.flatten(1)
    spans = start.gather(1, starts) + end.gather(1, ends)
    chosen = _largest(spans, num_spans)
    score, order = spans.gather(1, chosen).sort(dim=1, descending=True, stable=True)  # [n, k]
    chosen = chosen.gather(1, order)
    starts, ends = starts.gather(1, chosen), ends.gather(1, chosen)
    missing = 0, num_spans - score.shape[1]
    return F.pad(score, missing, value=IMPOSSIBLE), F.pad(starts, missing), F.pad(ends, missing)


def _largest(values: Tensor, count: int) -> Tensor:
    """[R, C] -> [R, min(count, C)] the columns of each row's largest values, ascending; of equal values the first ones.

    torch.topk may choose any of equal values, and takes several times as long as numpy's sort.
    """
    table, count = values.numpy(), min(count, values.shape[1])
    threshold = np.sort(table, axis=1)[:, -count, None]  # [R, 1]
    chosen = table >= threshold
    if np.count_nonzero(chosen) > len(table) * count:  # several values equal the threshold: all but the first have no room
        room = count - (table > threshold).sum(axis=1, keepdims=True)
        equal = table == threshold
        chosen &= ~equal | (equal.cumsum(axis=1) <= room)
    return torch.from_numpy(np.flatnonzero(chosen).reshape(-1, count) % table.shape[1])


def _log_sum_of_spans(start: Tensor, end: Tensor, max_answer_length: int, best: Tensor) -> Tensor:
    """[n, W], [n, W + D - 1], [n] the best span's score -> [n] log sum_s exp(start[s]) sum_{d < D} exp(end[s + d]).

    Every exp is taken relative to the window's highest start and end, so it is at most 1, and the best span's is exp(-gap).
    While the gap is small, what underflows is too small to count. The gap is large if the best start and the best end are too
    far apart for a span. Then the sum is taken in logarithms, which is several times slower.
    """
    lowest = torch.finfo(start.dtype).min  # instead of -inf, in a window without passage: -inf - -inf is NaN
    start_high, end_high = start.amax(dim=1).clamp(min=lowest), end.amax(dim=1).clamp(min=lowest)  # [n]
    if (start_high + end_high - best > MAX_GAP).any():
        return (start + _sliding(end, max_answer_length, torch.logaddexp)).logsumexp(dim=1)
    end_mass = _sliding((end - end_high[:, None]).exp_(), max_answer_length, torch.add)  # [n, W]
    mass = (start - start_high[:, None]).exp_().mul_(end_mass).sum(dim=1)
    return mass.log_() + (start_high + end_high)


def _sliding(values: Tensor, count: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """result[s] = values[s], ..., values[s + count - 1], combined (added, say); [n, C] -> [n, C - count + 1].

    By doubling: 13 values are 1 + 4 + 8 values, and 8 values are twice 4 neighbouring ones. No value enters twice.
    """
    length, result, done, reach = values.shape[1] - count + 1, None, 0, 1
    while done < count:
        if count & reach:
            part = values[:, done:done + length]  # values[s] combines `reach` of the original ones
            result = part if result is None else combine(result, part)
            done += reach
        if done < count:
            values = combine(values[:, :-reach], values[:, reach:])
        reach *= 2
    return result


def _log_sum_by_question(log_sum: Tensor, owner: Tensor, num_questions: int) -> Tensor:
    """[n] -> [q] logsumexp over the windows of each question."""
    high = log_sum.new_full((num_questions,), torch.finfo(log_sum.dtype).min).scatter_reduce(0, owner, log_sum, "amax")
    return log_sum.new_zeros(num_questions).index_add(0, owner, (log_sum - high[owner]).exp()).log() + high
