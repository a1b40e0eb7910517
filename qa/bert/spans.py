"""Start and end scores in, the n best legal spans of every question out.

The span head gives every token a start score and an end score; a span is worth their sum (Devlin et al. 2019,
arXiv:1810.04805, section 4.2):

    score(s, e) = start[s] + end[e]        legal: s <= e < s + D, all of it in the passage of one window

The usual post-processing pairs the 20 best starts with the 20 best ends, each chosen without a look at the other, and
so can miss spans. Here the n best of all pairs are found:

    best[s] = start[s] + max(end[s], ..., end[s + D - 1])      the best span that starts at s: a sliding maximum
    1. The n best spans start at the n starts of largest best[s]: any other start is beaten by those n already.
    2. Cut the D ends behind each of them into blocks of G: likewise, the n best spans end in the n best (start, block).
    3. Of the n G spans that are left, the n best.

Used by: decode.py, which takes the windows out of a data set's scores, and makes text of the spans.

N windows   L tokens (columns)   Q questions   K = num_best   D = max_answer_length   G ends in a block
n = K, or as many as there are
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qa.training.precision import at_least_fp32

IMPOSSIBLE = float("-inf")
MAX_GAP = 40.0  # exp(-40) is 4e-18; as much again is left until fp32 underflows, at 1e-38


class NonFiniteScores(ValueError):
    """The model gave NaN or infinity for a passage token. `questions`: the indices of the questions, ascending."""

    def __init__(self, questions: list[int]):
        super().__init__(f"non-finite scores in {len(questions)} questions, the first is number {questions[0]}")
        self.questions = questions


@dataclass
class SpanTable:
    """The K best legal spans per question, best first; of equal scores the earliest window, then start, then end."""

    score: Tensor  # [Q, K] start score + end score; -inf where not valid
    window: Tensor  # [Q, K] int64, index into the N windows
    start_token: Tensor  # [Q, K] int64, column of the window
    end_token: Tensor  # [Q, K] int64, inclusive
    valid: Tensor  # [Q, K] bool; False behind the last legal span
    log_normaliser: Tensor  # [Q] log of the sum of exp(score) over all legal (window, start, end); or -inf


def best_spans(start: Tensor, end: Tensor, legal: Tensor, question: Tensor, num_questions: int, num_best: int,
               max_answer_length: int) -> SpanTable:
    """The best spans of every question, over all pairs and windows.

    Args:
        start, end: [N, L] scores; half precision is raised to fp32.
        legal: [N, L] bool, True on passage tokens, which are contiguous in a window.
        question: [N] int64, the question of each window, ascending; every question has at least one window.

    Raises:
        NonFiniteScores: a NaN or infinite score at a legal position.
    """
    assert (legal[:, 1:] > legal[:, :-1]).sum(dim=1).add(legal[:, 0]).le(1).all(), "passage tokens are not contiguous"
    start, end = at_least_fp32(start.detach()), at_least_fp32(end.detach())
    broken = (legal & ~(start.isfinite() & end.isfinite())).any(dim=1)  # [N]
    if broken.any():
        raise NonFiniteScores(question[broken].unique().tolist())
    start, end = start.where(legal, IMPOSSIBLE), end.where(legal, IMPOSSIBLE)
    end = F.pad(end, (0, max_answer_length - 1), value=IMPOSSIBLE)  # [N, L + D - 1]
    return best_of_windows(start, end, question, num_questions, num_best, max_answer_length)


def best_of_windows(start: Tensor, end: Tensor, question: Tensor, num_questions: int, num_best: int,
                    max_answer_length: int) -> SpanTable:
    """`best_spans` of scores that are -inf where not legal already, and `end` padded with -inf to [N, L + D - 1]."""
    score, start_token, end_token = _best_in_window(start, end, num_best, max_answer_length)  # [N, K]
    log_normaliser = _log_sum_of_spans(start, end, max_answer_length, score[:, 0])  # [N]
    window = torch.arange(len(start), device=start.device)[:, None].expand_as(score)
    if num_questions < len(start):
        order = _order_by_question(score, question, num_questions)  # [Q, K]
        score, window, start_token, end_token = (column.reshape(-1)[order]
                                                 for column in (score, window, start_token, end_token))
        log_normaliser = _log_sum_by_question(log_normaliser, question, num_questions)
    return SpanTable(score, window, start_token, end_token, score > IMPOSSIBLE, log_normaliser)


def null_scores(null: Tensor, question: Tensor, num_questions: int) -> Tensor:
    """[N] start + end score of every window's null position -> [Q] the smallest of each question.

    The minimum, as in Google's run_squad.py for BERT: one window that holds the answer, and says so by a low null
    score, is enough.
    """
    return null.new_full((num_questions,), math.inf).scatter_reduce(0, question, null, "amin")  # [Q]


def sliding(values: Tensor, count: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """result[s] = values[s], ..., values[s + count - 1], combined; [N, L] -> [N, L - count + 1].

    By doubling. 13 values are 8 + 4 + 1; 8 of them are 4, and the 4 behind those. That takes about 2 log2(count)
    steps, and suits any associative function, such as a sum, because no value enters twice.
    """
    length = values.shape[1] - count + 1
    power, reach, result, done = values, 1, None, 0  # power[s] combines `reach` values
    while True:
        if count & reach:
            part = power[:, done:done + length]
            result = part if result is None else combine(result, part)
            done += reach
        if done == count:
            return result
        power = combine(power[:, :-reach], power[:, reach:])
        reach *= 2


def largest(values: Tensor, k: int) -> Tensor:
    """[R, C] -> [R, min(k, C)] columns of each row's k largest values, ascending; of equal values the first ones.

    torch.topk leaves ties open, and on a CPU takes several times as long as numpy's vectorised sort.
    """
    k = min(k, values.shape[1])
    return torch.from_numpy(_largest_numpy(values.numpy(), k)) if values.device.type == "cpu" else _largest_torch(values, k)


def _largest_torch(values: Tensor, k: int) -> Tensor:
    return values.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


def _largest_numpy(values: np.ndarray, k: int) -> np.ndarray:
    num_rows, num_columns = values.shape
    threshold = np.sort(values, axis=1)[:, num_columns - k, None]  # [R, 1] the k-th largest
    chosen = values >= threshold
    if np.count_nonzero(chosen) > num_rows * k:  # values that equal the k-th largest: all but the first have no room
        surplus = chosen.sum(axis=1, keepdims=True) - k
        tied = np.flatnonzero(surplus)
        level = values[tied] == threshold[tied]
        chosen[tied] &= ~level | (level.cumsum(axis=1) <= level.sum(axis=1, keepdims=True) - surplus[tied])
    return np.flatnonzero(chosen).reshape(num_rows, k) - np.arange(0, num_rows * num_columns, num_columns)[:, None]


def _best_in_window(start: Tensor, end: Tensor, num_best: int, max_answer_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The three steps above -> score, start, end, each [N, K], best first, -inf where there is no span."""
    block = next(g for g in range(math.isqrt(max_answer_length), 0, -1) if max_answer_length % g == 0)  # G
    num_blocks = max_answer_length // block
    block_best = F.max_pool1d(end, block, stride=1)  # [N, L + D - G]
    best = start + F.max_pool1d(block_best, num_blocks, stride=1, dilation=block)  # [N, L]

    starts = largest(best, num_best)  # [N, n]
    rows = torch.arange(len(start), device=start.device)[:, None]
    blocks = block_best.unfold(1, max_answer_length - block + 1, 1)[..., ::block][rows, starts]  # [N, n, D / G]
    blocks = blocks.add_(start.gather(1, starts)[..., None]).flatten(1)

    chosen = largest(blocks, num_best)  # [N, n]
    which = chosen // num_blocks
    starts = starts.gather(1, which)
    first_end = starts + (chosen - which * num_blocks) * block
    spans = _read(end, first_end, block).add_(start.gather(1, starts)[..., None]).flatten(1)  # by start, then end

    chosen = largest(spans, num_best)
    score, order = spans.gather(1, chosen).sort(dim=1, descending=True, stable=True)
    chosen = chosen.gather(1, order)
    which = chosen // block
    start_token, end_token = starts.gather(1, which), first_end.gather(1, which) + (chosen - which * block)
    if (missing := num_best - score.shape[1]) > 0:  # L D < K
        score = F.pad(score, (0, missing), value=IMPOSSIBLE)
        start_token, end_token = F.pad(start_token, (0, missing)), F.pad(end_token, (0, missing))
    return score, start_token, end_token


def _read(values: Tensor, columns: Tensor, width: int) -> Tensor:
    """[N, C], [N, n] -> [N, n, width] `width` values from each of the columns on."""
    num_rows, num_columns = values.shape
    cells = columns + torch.arange(0, num_rows * num_columns, num_columns, device=values.device)[:, None]
    return values.view(-1).unfold(0, width, 1).index_select(0, cells.view(-1)).view(*columns.shape, width)


def _log_sum_of_spans(start: Tensor, end: Tensor, max_answer_length: int, best: Tensor) -> Tensor:
    """[N, L], [N, L + D - 1], [N] the best span's score -> [N] log sum_s exp(start[s]) sum_{d < D} exp(end[s + d]).

    Relative to the window's highest start and end a factor is at most 1, and the best span is worth exp(-gap). While
    the gap is small, what underflows is too small to count. Where it is large, because the best start and the best end
    are too far apart to make a span, the sum is taken in logarithms, which is several times slower.
    """
    lowest = torch.finfo(start.dtype).min  # instead of -inf, in a window without passage: -inf - -inf is NaN
    start_high, end_high = start.amax(dim=1).clamp(min=lowest), end.amax(dim=1).clamp(min=lowest)  # [N]
    if (start_high + end_high - best > MAX_GAP).any():
        return (start + sliding(end, max_answer_length, torch.logaddexp)).logsumexp(dim=1)
    end_mass = sliding((end - end_high[:, None]).exp_(), max_answer_length, torch.add)  # [N, L]
    mass = (start - start_high[:, None]).exp_().mul_(end_mass).sum(dim=1)
    return mass.log_() + (start_high + end_high)


def _order_by_question(score: Tensor, question: Tensor, num_questions: int) -> Tensor:
    """Where the K best of each question stand in the flattened [N, K] `score` of its windows: [Q, K]."""
    num_best = score.shape[1]
    order = score.flatten().sort(descending=True, stable=True).indices  # stable: ties stay in the order of windows
    order = order[question.repeat_interleave(num_best)[order].sort(stable=True).indices]  # by question, then by score
    first = torch.searchsorted(question, torch.arange(num_questions, device=question.device))  # [Q] first window
    return order[first[:, None] * num_best + torch.arange(num_best, device=question.device)]


def _log_sum_by_question(log_sum: Tensor, question: Tensor, num_questions: int) -> Tensor:
    """[N] -> [Q] logsumexp over the windows of each question."""
    shift = log_sum.new_full((num_questions,), IMPOSSIBLE).scatter_reduce(0, question, log_sum, "amax")
    shift = shift.clamp(min=torch.finfo(shift.dtype).min)  # as above, in a question without passage
    return log_sum.new_zeros(num_questions).index_add(0, question, (log_sum - shift[question]).exp()).log() + shift
