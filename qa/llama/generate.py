"""Greedy decoding over a KV cache: the passage is read once for all of its questions, many passages at a time.

A batch is the packed rows of packing.py, and decoding is these rows going on. Every step appends the newest token of
each open answer to its row; by its segment it sees the passage, its own question and its own answer so far:

    columns      0 ............................ L | step 1 | step 2 | ...
    row 0   instruction  passage 0  q1  q2  q3    | 1 2 3  | 1 3    |       (question 2 has ended: its slot is gone)
    row 1   instruction  passage 1  q1  q2  pad   | 1 2 .  | 2 .    |

So a passage's keys are stored once, not once per question, and the instruction's are computed once per run. The
language-model head runs where a token is chosen, and nowhere else. Rows whose questions have all ended are dropped.

    answer = t_1 ... t_n:   t_i = argmax P(t | prompt, t_1 .. t_{i-1}),   up to the first t_{n+1} that is an end token
    log P  = sum_i log P(t_i | ...) + log P(end | prompt, t_1 .. t_n),    P(end) = sum over all end tokens

A draft saves steps. Where the answer so far stands in the passage it will probably go on as the passage does, so the
next tokens are copied from there and fed together with the newest one. Every fed token yields the model's own choice
of its successor; the copied tokens are kept as far as they equal these choices, and the rest is hidden from the cache.
The answer is that of plain greedy decoding, in fewer passes (Saxena 2023, "Prompt Lookup Decoding"; Leviathan et al.
2023, arXiv:2211.17192, for drafts in general).

The score is the one that extract.py maximises over spans. Input: prompts from encode.py. Used by: llama/reader.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qa.errors import not_finite
from qa.llama.attention import use_packed_attention
from qa.llama.cache import GROWTH, KVCache, forward_tokens
from qa.llama.encode import Prompt, group_by_example
from qa.llama.packing import Row, collate, micro_batches
from qa.llama.prompt import PromptTemplate
from qa.training.precision import at_least_fp32

# B rows of a batch, L tokens of the longest, Q questions, T tokens fed in a step, H hidden size, V vocabulary

DRAFT = 4  # tokens copied at a time: as many as SQuAD's answers have, on average


@dataclass
class Reading:
    """Rows that have been read up to their questions' cues: all that a decoder starts from."""

    prompts: list[Prompt]
    cache: KVCache
    rows: Tensor  # [Q] row of each question, ascending
    segments: Tensor  # [Q] its segment in that row
    positions: Tensor  # [Q] the position of its answer's first token
    hidden: Tensor  # [Q, H] that predict its answer's first token


def read_instruction(model, instruction_ids: list[int], micro_tokens: int) -> KVCache:
    """The cache of what stands before every passage, as one row."""
    use_packed_attention(model)
    cache = KVCache(1, len(instruction_ids), model.device)
    if instruction_ids:
        ids = torch.tensor(instruction_ids, device=model.device)
        zeros = torch.zeros_like(ids)
        _read_on(model, cache, micro_tokens, zeros, ids, torch.arange(len(ids), device=ids.device), zeros)
    return cache


def read(model, rows: Sequence[Row], instruction_ids: list[int], instruction: KVCache, micro_tokens: int) -> Reading:
    """Read passages and questions after the instruction, once."""
    batch = collate(rows, instruction_ids, instruction_is_cached=True).to(model.device)
    cache = instruction.select(torch.zeros(len(rows), dtype=torch.int64, device=model.device))
    cache.reserve(cache.length + max(row.num_tokens() for row in rows) + GROWTH)
    hidden = _read_on(model, cache, micro_tokens, batch.layout.rows, batch.input_ids, batch.positions, batch.segments)
    cues = batch.predicting  # [Q]
    return Reading(batch.prompts, cache, batch.layout.rows[cues], batch.segments[cues], batch.positions[cues] + 1,
                   hidden[cues])


def _read_on(model, cache: KVCache, micro_tokens: int, *tokens: Tensor) -> Tensor:
    """`forward_tokens` of rows, ids, positions and segments [T]: [T, H]. One long row is read piece by piece."""
    pieces = zip(*(of_tokens.split(micro_tokens) for of_tokens in tokens), strict=True)
    return torch.cat([forward_tokens(model, cache, *piece) for piece in pieces])


def _logits(model, hidden: Tensor) -> Tensor:
    return at_least_fp32(model.lm_head(hidden))  # [T, H] -> [T, V]


@dataclass(eq=False)
class Generation:
    """The greedy answer to one prompt."""

    prompt: Prompt
    token_ids: list[int] = field(default_factory=list)  # without the end token
    text: str = ""
    log_prob: float = 0.0  # of the tokens and the end
    is_complete: bool = False  # False: cut off after max_new_tokens; then log_prob has no end in it
    refusal_log_prob: float | None = None  # v2.0: log P(refusal, end | prompt)


@torch.inference_mode()
def generate(model, template: PromptTemplate, prompts: Sequence[Prompt], max_new_tokens: int,
             micro_tokens: int) -> list[Generation]:
    """Answer every prompt greedily; the answers stand in the prompts' order.

    Args:
        max_new_tokens: tokens of an answer at most, the end token included.
        micro_tokens: tokens read at a time, padding included; bounds the memory.
    """
    instruction = read_instruction(model, template.instruction_ids, micro_tokens)
    answers: dict[Prompt, Generation] = {}
    for rows in micro_batches(prompts, len(template.instruction_ids), micro_tokens):
        reading = read(model, rows, template.instruction_ids, instruction, micro_tokens)
        refusals = [None] * len(reading.prompts)
        if template.refusal:
            refusals = score(model, reading, template, [template.answer_ids(template.refusal)] * len(refusals))
        for generation, refusal in zip(decode(model, reading, template, max_new_tokens), refusals, strict=True):
            generation.text = template.decode(generation.token_ids)
            generation.refusal_log_prob = refusal
            answers[generation.prompt] = generation
    return [answers[prompt] for prompt in prompts]


def decode(model, reading: Reading, template: PromptTemplate, max_new_tokens: int) -> list[Generation]:
    """Take the most probable token until it is an end token. The reading's cache is used up."""
    cache, device = reading.cache, model.device
    rows, segments, positions = (of.tolist() for of in (reading.rows, reading.segments, reading.positions))
    answers = [Generation(prompt) for prompt in reading.prompts]
    for answer, choice in zip(answers, _choices(_logits(model, reading.hidden), template), strict=True):
        _append(answer, choice, template)
    while open_questions := [q for q, answer in enumerate(answers) if _is_open(answer, max_new_tokens)]:
        cache, rows = drop_ended_rows(cache, rows, open_questions)
        drafts = [_draft(answers[q], max_new_tokens) for q in open_questions]
        fed = []  # (row, id, position, segment) of every token: an answer's last one, and its draft
        for q, draft in zip(open_questions, drafts, strict=True):
            position = positions[q] + len(answers[q].token_ids) - 1
            ids = [answers[q].token_ids[-1], *draft]
            fed += [(rows[q], id, position + i, segments[q]) for i, id in enumerate(ids)]
        fed_rows, *others = torch.tensor(list(zip(*fed, strict=True)), device=device)  # 4 of [T]
        hidden = forward_tokens(model, cache, fed_rows, *others)  # [T, H]
        choices = _choices(_logits(model, hidden), template)  # what follows each fed token

        wrong, begin = [], 0
        for q, draft in zip(open_questions, drafts, strict=True):
            num_right = 0
            for guess in [*draft, None]:
                _append(answers[q], choices[begin + num_right], template)
                if not _is_open(answers[q], max_new_tokens) or answers[q].token_ids[-1] != guess:
                    break
                num_right += 1
            wrong += range(begin + num_right + 1, begin + len(draft) + 1)
            begin += len(draft) + 1
        cache.hide(fed_rows[wrong], cache.columns[wrong])
    return answers


def _choices(logits: Tensor, template: PromptTemplate) -> list[tuple[int, float, float]]:
    """[T, V] -> for each the most probable token, its log-probability, and that of the end."""
    end_ids = torch.tensor(template.end_token_ids, device=logits.device)
    best, tokens = logits.max(dim=-1)
    total = logits.logsumexp(dim=-1)
    log_probs, end_log_probs = best - total, logits[:, end_ids].logsumexp(dim=-1) - total
    return list(zip(tokens.tolist(), log_probs.tolist(), end_log_probs.tolist(), strict=True))


def _append(answer: Generation, choice: tuple[int, float, float], template: PromptTemplate) -> None:
    token, log_prob, end_log_prob = choice
    if not math.isfinite(log_prob):
        raise not_finite(answer.prompt.id)
    is_end = token in template.end_token_ids
    answer.log_prob += end_log_prob if is_end else log_prob
    answer.is_complete = is_end or token in template.closing_token_ids
    if not is_end:
        answer.token_ids.append(token)


def _is_open(answer: Generation, max_new_tokens: int) -> bool:
    return not answer.is_complete and len(answer.token_ids) < max_new_tokens


def _draft(answer: Generation, max_new_tokens: int) -> list[int]:
    """What follows in the passage, if the answer so far stands in it (the first time that it does)."""
    passage, so_far = answer.prompt.piece.ids, answer.token_ids
    size = min(DRAFT, max_new_tokens - len(so_far) - 1)
    for end in range(len(so_far), len(passage)):
        if passage[end - 1] == so_far[-1] and passage[end - len(so_far) : end] == so_far:
            return passage[end : end + size]
    return []


def drop_ended_rows(cache: KVCache, rows: list[int], open_questions: list[int]) -> tuple[KVCache, list[int]]:
    """Once half of the rows have no open question: the cache of the others, and the questions' rows in it."""
    open_rows = sorted({rows[q] for q in open_questions})
    if 2 * len(open_rows) > cache.segments.shape[0]:
        return cache, rows
    renumbered = {row: number for number, row in enumerate(open_rows)}
    selected = cache.select(torch.tensor(open_rows, device=cache.segments.device))
    return selected, [renumbered.get(row, -1) for row in rows]


def score(model, reading: Reading, template: PromptTemplate, answers: Sequence[list[int]], chunk: int = 0) -> list[float]:
    """log P(tokens, end | prompt) of one given answer per question, as `PromptTemplate.answer_ids` encodes it.

    The answers' tokens are run over the reading's cache and leave no trace in it. `chunk`: rows of logits at a time; 0: all.
    """
    device, num_questions = model.device, len(answers)
    lengths = torch.tensor([len(ids) - 1 for ids in answers], device=device)  # without the end
    fed = torch.tensor([id for ids in answers for id in ids[:-1]], device=device)  # [T]
    steps = torch.tensor([step for ids in answers for step in range(len(ids) - 1)], device=device)
    rows, segments, positions = (
        of_question.repeat_interleave(lengths) for of_question in (reading.rows, reading.segments, reading.positions))
    hidden = forward_tokens(model, reading.cache, rows, fed, positions + steps, segments, keep=False)
    hidden = torch.cat([reading.hidden, hidden])  # [Q + T, H]

    # Each token is predicted by the one before it (rows Q ... Q + T - 1), the first by the cue (rows 0 ... Q - 1).
    cues = torch.arange(num_questions, device=device)  # [Q]
    owners = cues.repeat_interleave(lengths)  # [T]
    after = num_questions + torch.arange(len(fed), device=device)  # [T]
    before, order = torch.where(steps == 0, owners, after - 1).sort()
    last = torch.where(lengths == 0, cues, num_questions + lengths.cumsum(0) - 1)
    log_probs, end_log_probs = chosen_log_probs(model, template, hidden, before, fed[order], chunk or len(hidden))
    return end_log_probs[last].index_add(0, owners[order], log_probs).tolist()


def chosen_log_probs(model, template: PromptTemplate, hidden: Tensor, owners: Tensor, tokens: Tensor,
                     chunk: int) -> tuple[Tensor, Tensor]:
    """What a few tokens' log-probabilities are, without [T, V] numbers at once.

    Args:
        hidden: [T, H].
        owners, tokens: [N] the token that may follow `hidden[owner]`; `owners` ascending.
        chunk: rows of logits at a time.

    Returns:
        log P(token | owner) [N], log P(end | each of the T) [T].
    """
    end_ids = torch.tensor(template.end_token_ids, device=hidden.device)
    begins = torch.arange(0, len(hidden) + chunk, chunk, device=hidden.device)
    bounds = torch.searchsorted(owners, begins).tolist()
    found, ends = [], []
    for number, begin in enumerate(range(0, len(hidden), chunk)):
        log_probs = _logits(model, hidden[begin : begin + chunk]).log_softmax(dim=-1)  # [chunk, V]
        part = slice(bounds[number], bounds[number + 1])
        found.append(log_probs[owners[part] - begin, tokens[part]])
        ends.append(log_probs[:, end_ids].logsumexp(dim=-1))
    return torch.cat(found), torch.cat(ends)


def log_odds(log_prob: float) -> float:
    """log(p / (1 - p)); of a refusal it is the no-answer score of both decoders: above 0, it is more probable than not."""
    log_prob = min(log_prob, -1e-9)  # a sum of rounded terms may reach 0
    return log_prob - math.log(-math.expm1(log_prob))


def best_pieces(generations: Sequence[Generation], refusal: str | None) -> list[Generation]:
    """One answer per example, of passages read in pieces: the most probable that is no refusal and not empty, if there is."""
    chosen = []
    for pieces, refusal_log_prob in group_by_example(generations):
        best = max(pieces, key=lambda piece: (piece.text not in ("", refusal), piece.log_prob))
        chosen.append(replace(best, refusal_log_prob=refusal_log_prob))
    return chosen
