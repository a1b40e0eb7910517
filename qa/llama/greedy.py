"""Greedy decoding: the model writes its most probable token, then the next one, until it ends the answer.

    answer = t_1 ... t_n:   t_i = argmax P(t | prompt, t_1 .. t_{i-1}),   up to the first t_{n+1} that is an end token
    log P  = sum_i log P(t_i | ...) + log P(end | prompt, t_1 .. t_n),    P(end) = sum over all end tokens

`greedy` does so for one question. `generate` gives the same answers for many questions in far less time: the passages are read
once (reading.py), and each pass adds the newest token of every open answer to its row of the cache. A token sees the passage,
its own question and its own answer so far:

    columns      0 ................................ L | pass 1 | pass 2 | ...
    row 0        instruction  passage 0  q1  q2  q3   | 1 2 3  | 1 3    |       (question 2 has ended)
    row 1        instruction  passage 1  q1  q2       | 1 2 .  | 2 .    |

Where a draft is right (drafts.py), a pass adds several tokens. Input: prompts from encode.py. Used by: llama/reader.py;
trace.py (`next_log_probs`).

Letters: L tokens of the longest row, T tokens fed in a pass, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from qa.errors import not_finite
from qa.llama.cache import forward_tokens
from qa.llama.drafts import accept, make_draft
from qa.llama.encode import Prompt, group_by_example
from qa.llama.prompt import PromptTemplate
from qa.llama.reading import Reading, drop_ended_rows, logit_rows, next_logits, read, refusal_log_probs
from qa.training.precision import at_least_fp32


@torch.inference_mode()
def next_log_probs(model, ids: list[int]) -> Tensor:
    """log P of each token that may follow `ids`: [V]. The plain way: the whole sequence through the model, no cache."""
    logits = model(torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1).logits[0, -1]
    return at_least_fp32(logits).log_softmax(dim=-1)


@torch.inference_mode()
def greedy(model, template: PromptTemplate, prompt: Prompt, max_new_tokens: int) -> tuple[list[int], float]:
    """The plain version: the answer's tokens and its log P, by one pass over the whole sequence for each token."""
    prompt_ids = template.instruction_ids + prompt.piece.ids + prompt.question_ids
    answer: list[int] = []
    log_prob = 0.0
    while len(answer) < max_new_tokens:
        log_probs = next_log_probs(model, prompt_ids + answer)  # [V]
        token = int(log_probs.argmax())
        if token in template.end_token_ids:
            return answer, log_prob + float(log_probs[template.end_token_ids].logsumexp(dim=-1))
        answer.append(token)
        log_prob += float(log_probs[token])
        if token in template.closing_token_ids:  # ".\n": the last characters and the end in one token
            break
    return answer, log_prob


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
    """Answer every prompt greedily, in order. An answer has at most `max_new_tokens` tokens, the end token included."""
    answers: dict[Prompt, Generation] = {}
    chunk = logit_rows(model, micro_tokens)
    for reading in read(model, template, prompts, micro_tokens):
        refusals = refusal_log_probs(model, reading, template, chunk)
        for generation, refusal in zip(write_answers(model, reading, template, max_new_tokens, chunk), refusals, strict=True):
            generation.text = template.decode(generation.token_ids)
            generation.refusal_log_prob = refusal
            answers[generation.prompt] = generation
    return [answers[prompt] for prompt in prompts]


def write_answers(model, reading: Reading, template: PromptTemplate, max_new_tokens: int, chunk: int) -> list[Generation]:
    """Take the most probable token until it is an end token. The reading's cache is used up. chunk: logits' rows at a time."""
    cache, device = reading.cache, model.device
    rows, segments, positions = (values.tolist() for values in (reading.rows, reading.segments, reading.positions))
    answers = [Generation(prompt) for prompt in reading.prompts]
    for answer, choice in zip(answers, _choices(model, reading.hidden, template, chunk), strict=True):
        _append(answer, choice, template)
    while open_questions := [q for q, answer in enumerate(answers) if _is_open(answer, max_new_tokens)]:
        cache, rows = drop_ended_rows(cache, rows, open_questions)
        drafts = [make_draft(answers[q].prompt.piece.ids, answers[q].token_ids, max_new_tokens - len(answers[q].token_ids) - 1)
                  for q in open_questions]
        fed = []  # (row, id, position, segment) of every token: an answer's last one, and its draft
        for q, draft in zip(open_questions, drafts, strict=True):
            position = positions[q] + len(answers[q].token_ids) - 1
            ids = [answers[q].token_ids[-1], *draft]
            fed += [(rows[q], id, position + i, segments[q]) for i, id in enumerate(ids)]
        fed_rows, *others = torch.tensor(list(zip(*fed, strict=True)), device=device)  # 4 of [T]
        hidden = forward_tokens(model, cache, fed_rows, *others)  # [T, H]
        choices = _choices(model, hidden, template, chunk)  # what follows each fed token

        wrong, begin = [], 0  # wrong: tokens of drafts that the cache must forget
        for q, draft in zip(open_questions, drafts, strict=True):
            end = begin + len(draft) + 1
            num_right = accept(draft, [choice.token for choice in choices[begin:end]])
            for choice in choices[begin : begin + num_right + 1]:
                if _is_open(answers[q], max_new_tokens):
                    _append(answers[q], choice, template)
            wrong += range(begin + num_right + 1, end)
            begin = end
        cache.hide(fed_rows[wrong], cache.columns[wrong])
    return answers


class Choice(NamedTuple):
    token: int  # the most probable one
    log_prob: float
    end_log_prob: float  # of all end tokens together


def _choices(model, hidden: Tensor, template: PromptTemplate, chunk: int) -> list[Choice]:
    """[T, H] -> T choices. The logits of `chunk` tokens at a time are in memory, not [T, V]."""
    choices = []
    for part in hidden.split(chunk):
        logits = next_logits(model, part)  # [chunk, V]
        best, tokens = logits.max(dim=-1)
        ends, total = logits[:, template.end_token_ids].logsumexp(dim=-1), logits.logsumexp(dim=-1)
        choices.append(torch.stack([tokens.to(total.dtype), best - total, ends - total], dim=1))  # [chunk, 3]
    return [Choice(int(token), *log_probs) for token, *log_probs in torch.cat(choices).tolist()]


def _append(answer: Generation, choice: Choice, template: PromptTemplate) -> None:
    if not math.isfinite(choice.log_prob):
        raise not_finite(answer.prompt.id)
    is_end = choice.token in template.end_token_ids
    answer.log_prob += choice.end_log_prob if is_end else choice.log_prob
    answer.is_complete = is_end or choice.token in template.closing_token_ids
    if not is_end:
        answer.token_ids.append(choice.token)


def _is_open(answer: Generation, max_new_tokens: int) -> bool:
    return not answer.is_complete and len(answer.token_ids) < max_new_tokens


def best_pieces(generations: Sequence[Generation], refusal: str | None) -> list[Generation]:
    """One answer per example. Of a passage in pieces: the most probable that is no refusal and not empty, if there is one."""
    chosen = []
    for answers, refusal_log_prob in group_by_example(generations):
        best = max(answers, key=lambda answer: (answer.text not in ("", refusal), answer.log_prob))
        chosen.append(replace(best, refusal_log_prob=refusal_log_prob))
    return chosen
