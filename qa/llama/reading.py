"""Passages and questions are read once, up to the cue "Answer:"; both decoders go on from there.

A micro-batch is the packed rows of packing.py. After reading, the KV cache holds them:

    columns      0 ................................... L
    row 0        instruction  passage 0  q1  q2  q3
    row 1        instruction  passage 1  q1  q2  (empty)

So the keys and values of a passage are computed and stored once, not once per question; those of the instruction are computed
once for all micro-batches. The language-model head runs only where a token is chosen or scored.

Input: prompts from encode.py. Used by: greedy.py, extract.py.

Letters: Q questions of a micro-batch, L tokens of its longest row, T tokens, N tokens whose log-probabilities are asked for,
H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qa.llama.attention import use_packed_attention
from qa.llama.cache import GROWTH, KVCache, forward_tokens
from qa.llama.encode import Prompt
from qa.llama.memory import PassageMemory
from qa.llama.packing import Row, collate, micro_batches
from qa.llama.prompt import PromptTemplate
from qa.training.precision import at_least_fp32


@dataclass
class Reading:
    """Rows that have been read up to their questions' cues: all that a decoder starts from."""

    prompts: list[Prompt]
    cache: KVCache
    rows: Tensor  # [Q] row of each question, ascending
    segments: Tensor  # [Q] its segment in that row
    positions: Tensor  # [Q] the position of its answer's first token
    hidden: Tensor  # [Q, H] that predict its answer's first token


def read(model, template: PromptTemplate, prompts: Sequence[Prompt], micro_tokens: int,
         memory: PassageMemory | None = None) -> Iterator[Reading]:
    """Read all prompts in micro-batches of at most `micro_tokens` tokens, padding included. Call it in inference mode.

    With a `memory`, passages that it has are not read again, and it keeps the others.
    """
    use_packed_attention(model)
    instruction_ids = template.instruction_ids
    instruction = KVCache(1, len(instruction_ids), model.device)  # of one row; every micro-batch copies it
    if instruction_ids:
        ids = torch.tensor(instruction_ids, device=model.device)
        zeros = torch.zeros_like(ids)
        _read_tokens(model, instruction, micro_tokens, zeros, ids, torch.arange(len(ids), device=ids.device), zeros)
    for rows in micro_batches(prompts, len(instruction_ids), micro_tokens):
        micro_batch = collate(rows, instruction_ids, instruction_is_cached=True).to(model.device)
        cache = instruction.select(torch.zeros(len(rows), dtype=torch.int64, device=model.device))
        cache.reserve(cache.length + max(row.num_tokens() for row in rows) + GROWTH)
        tokens = micro_batch.layout.rows, micro_batch.input_ids, micro_batch.positions, micro_batch.segments  # each [T]
        cues = micro_batch.predicting  # [Q]
        if memory is not None:
            _read_passages(model, cache, micro_tokens, memory, rows, tokens)
            tokens = tuple(values[micro_batch.segments > 0] for values in tokens)
            cues = cues - (micro_batch.segments == 0).cumsum(0)[cues]
        hidden = _read_tokens(model, cache, micro_tokens, *tokens)  # [T, H]
        token_rows, _, positions, segments = tokens
        yield Reading(micro_batch.prompts, cache, token_rows[cues], segments[cues], positions[cues] + 1, hidden[cues])


def _read_passages(model, cache: KVCache, micro_tokens: int, memory: PassageMemory, rows: Sequence[Row],
                   tokens: tuple[Tensor, ...]) -> None:
    """Fill the cache with the rows' passages: from the memory, or by the model, which the memory keeps."""
    begin, known = cache.length, [row.piece in memory for row in rows]
    token_rows, *_, segments = tokens
    new = (segments == 0) & ~torch.tensor(known, device=segments.device)[token_rows]  # [T]
    if new.any():
        _read_tokens(model, cache, micro_tokens, *(values[new] for values in tokens))
    for number, row in enumerate(rows):
        if known[number]:
            memory.recall(row.piece, cache, number, begin)
        else:
            memory.keep(row.piece, cache, number, begin + (cache.segments[number, begin:] == 0).nonzero()[:, 0])


def _read_tokens(model, cache: KVCache, micro_tokens: int, *tokens: Tensor) -> Tensor:
    """`forward_tokens` of rows, ids, positions and segments [T], `micro_tokens` at a time: [T, H]."""
    chunks = zip(*(values.split(micro_tokens) for values in tokens), strict=True)
    return torch.cat([forward_tokens(model, cache, *chunk) for chunk in chunks])


def logit_rows(model, micro_tokens: int) -> int:
    """So many rows of logits take no more memory than the hidden states of a micro-batch that is read."""
    return max(micro_tokens * model.config.hidden_size // model.config.vocab_size, 1)


def next_logits(model, hidden: Tensor) -> Tensor:
    return at_least_fp32(model.lm_head(hidden))  # [T, H] -> [T, V]


def drop_ended_rows(cache: KVCache, rows: list[int], open_questions: list[int]) -> tuple[KVCache, list[int]]:
    """Once half of the rows have no open question: the cache of the others, and the questions' rows in it."""
    open_rows = sorted({rows[q] for q in open_questions})
    if 2 * len(open_rows) > cache.segments.shape[0]:
        return cache, rows
    renumbered = {row: number for number, row in enumerate(open_rows)}
    selected = cache.select(torch.tensor(open_rows, device=cache.segments.device))
    return selected, [renumbered.get(row, -1) for row in rows]


def refusal_log_probs(model, reading: Reading, template: PromptTemplate, chunk: int = 0) -> list[float | None]:
    """v2.0: log P(refusal, end | prompt) of each question; v1.1: None of each."""
    num_questions = len(reading.prompts)
    if template.refusal is None:
        return [None] * num_questions
    return answer_log_probs(model, reading, template, [template.answer_ids(template.refusal)] * num_questions, chunk)


def answer_log_probs(model, reading: Reading, template: PromptTemplate, answers: Sequence[list[int]],
                     chunk: int = 0) -> list[float]:
    """log P(tokens, end | prompt) of one given answer per question, as `PromptTemplate.answer_ids` encodes it.

    The cache is the same afterwards. `chunk`: rows of logits at a time; 0: all.
    """
    tokens = [(q, step, id) for q, ids in enumerate(answers) for step, id in enumerate(ids[:-1])]  # without the ends
    questions, steps, fed = torch.tensor(list(zip(*tokens, strict=True)), device=model.device)  # 3 of [T]
    hidden = forward_tokens(model, reading.cache, reading.rows[questions], fed, reading.positions[questions] + steps,
                            reading.segments[questions], keep=False)
    hidden = torch.cat([reading.hidden, hidden])  # [Q + T, H]

    # Each token is predicted by the one before it (rows Q ... Q + T - 1 of hidden), the first by the cue (rows 0 ... Q - 1).
    cues, places = torch.arange(len(hidden), device=model.device).split([len(answers), len(fed)])  # [Q], [T]
    before = torch.where(steps == 0, questions, places - 1)  # [T]
    last = cues.scatter_reduce(0, questions, places, "amax")  # [Q] the last place of each answer, else its cue
    log_probs, end_log_probs = chosen_log_probs(model, template, hidden, before, fed, chunk or len(hidden))
    return end_log_probs[last].index_add(0, questions, log_probs).tolist()


def chosen_log_probs(model, template: PromptTemplate, hidden: Tensor, before: Tensor, tokens: Tensor,
                     chunk: int) -> tuple[Tensor, Tensor]:
    """log P of tokens [N], each after the token of hidden[before] ([T, H], [N]); and of the end after each of the T: [T].

    The logits of `chunk` tokens at a time are in memory, not [T, V].
    """
    found, ends = at_least_fp32(hidden.new_zeros(len(tokens))), []
    for begin in range(0, len(hidden), chunk):
        log_probs = next_logits(model, hidden[begin : begin + chunk]).log_softmax(dim=-1)  # [chunk, V]
        here = (begin <= before) & (before < begin + chunk)  # [N]
        found[here] = log_probs[before[here] - begin, tokens[here]]
        ends.append(log_probs[:, template.end_token_ids].logsumexp(dim=-1))
    return found, torch.cat(ends)
