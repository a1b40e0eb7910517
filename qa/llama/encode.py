"""Passages -> prompts, encoded; a passage too long for the model in overlapping pieces.

BERT reads windows (qa/bert/windows.py); LLaMA reads nearly every passage whole. Only where prompt and answer together
exceed `max_length` tokens is the passage cut. In training a question is put to the one piece that shows its answer
best; in decoding to every piece, and the most probable answer is kept (`generate.best_pieces`).

Input: Passages and a PromptTemplate. Used by: train_llama.py and llama/reader.py, which hand the prompts to packing.py
and generate.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from qa.data.squad import Example, Passage
from qa.errors import UserError
from qa.llama.prompt import PromptTemplate, answer_text

Answer = TypeVar("Answer")  # generate.py's Generation, search.py's Extraction


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """A passage, or a piece of one, encoded; the same object for all its questions, which are told to share a row by it."""

    ids: list[int]
    text: str  # the passage's, from start_char on
    start_char: int

    @property
    def end_char(self) -> int:
        return self.start_char + len(self.text)


@dataclass(frozen=True, eq=False, slots=True)
class Prompt:
    """A question about a passage, encoded."""

    index: int  # which of the examples, counted over all passages
    id: str  # the example's, for messages
    piece: Piece
    question_ids: list[int]  # with the cue
    answer_ids: list[int]  # with the end token; in decoding []


def encode_passages(template: PromptTemplate, passages: Sequence[Passage], max_length: int,
                    overlap: int = 128, max_new_tokens: int = 0) -> tuple[list[Prompt], list[str]]:
    """Encode all questions on the passages. Passages with the same text are one to the model: they share their pieces.

    Args:
        max_length: the most tokens of prompt and answer: the model's context, or --max-length.
        overlap: tokens that neighbouring pieces of a passage share (half a piece at most).
        max_new_tokens: 0 for training: one prompt per example, each of which must be trainable, with its answer.
            Otherwise for decoding: one per example and piece, in order, with room for so long an answer.

    Returns:
        The prompts, and one line for each kind of cut that was made, to print.
    """
    training = max_new_tokens == 0
    texts = [passage.text for passage in passages for _ in passage.examples]
    examples = [example for passage in passages for example in passage.examples]
    answers = [template.answer_ids(answer_text(example)) if training else [] for example in examples]
    questions, notes = _encode_questions(template, examples, max_tokens=max_length // 4)
    longest_tail = max((len(question) + (len(answer) or max_new_tokens)
                        for question, answer in zip(questions, answers, strict=True)), default=0)
    room = max_length - len(template.instruction_ids) - longest_tail
    if room < 8:
        raise UserError(f"--max-length {max_length}: instruction ({len(template.instruction_ids)} tokens), question and "
                        f"answer ({longest_tail}) leave no room for a passage; give more, or fewer --shots")
    overlap = min(overlap, room // 2)
    pieces_of = {text: _pieces(template, text, room, overlap) for text in dict.fromkeys(texts)}
    prompts = []
    for index, (text, example, question, answer) in enumerate(zip(texts, examples, questions, answers, strict=True)):
        pieces = pieces_of[text]
        for piece in [_piece_with_answer(pieces, example)] if training else pieces:
            prompts.append(Prompt(index, example.id, piece, question, answer))
    if num_long := sum(len(pieces) > 1 for pieces in pieces_of.values()):
        notes.append(f"{num_long} of {len(pieces_of)} passages are too long for {max_length} tokens: read in pieces "
                     f"of at most {room} tokens that share {overlap}")
    return prompts, notes


def passages_and_lengths(prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """What the batch plan needs: which passage each prompt is about, and its tokens without the instruction; int64 [N] each."""
    numbers: dict[Piece, int] = {}
    passage = [numbers.setdefault(prompt.piece, len(numbers)) for prompt in prompts]
    lengths = [len(prompt.piece.ids) + len(prompt.question_ids) + len(prompt.answer_ids) for prompt in prompts]
    return np.array(passage, dtype=np.int64), np.array(lengths, dtype=np.int64)


def group_by_example(found: Iterable[Answer]) -> list[tuple[list[Answer], float | None]]:
    """What a decoder found in each piece of an example's passage, example by example; v2.0: with the log P of its refusal.

    That is the least of all pieces: a passage answers if one of its pieces does.
    """
    by_example: dict[int, list[Answer]] = {}
    for of_piece in found:
        by_example.setdefault(of_piece.prompt.index, []).append(of_piece)
    return [(pieces, min((piece.refusal_log_prob for piece in pieces if piece.refusal_log_prob is not None), default=None))
            for pieces in by_example.values()]


def all_tokens(prompts: Sequence[Prompt]) -> np.ndarray:
    """Every token of the prompts, a passage's once; int32, for a fingerprint of what a run learns from."""
    pieces = dict.fromkeys(prompt.piece for prompt in prompts)
    segments = [piece.ids for piece in pieces]
    segments += [part for prompt in prompts for part in (prompt.question_ids, prompt.answer_ids)]
    return np.concatenate([np.array(segment, dtype=np.int32) for segment in segments])


def _encode_questions(template: PromptTemplate, examples: Sequence[Example],
                      max_tokens: int) -> tuple[list[list[int]], list[str]]:
    questions, cut_ids = [], []
    for example in examples:
        question_ids = template.question_ids(example.question)
        if len(question_ids) > max_tokens:
            question_ids = template.question_ids(example.question, max_tokens)
            cut_ids.append(example.id)
        questions.append(question_ids)
    if not cut_ids:
        return questions, []
    return questions, [f"{len(cut_ids)} questions of more than {max_tokens} tokens were cut (e.g. {cut_ids[0]})"]


def _pieces(template: PromptTemplate, text: str, room: int, overlap: int) -> list[Piece]:
    ranges = template.split_passage(text, room, overlap)
    return [Piece(template.passage_ids(text[start_char:end_char]), text[start_char:end_char], start_char)
            for start_char, end_char in ranges]


def _piece_with_answer(pieces: list[Piece], example: Example) -> Piece:
    """The piece in which the answer is furthest from an edge; the first one for an unanswerable question."""
    if example.is_impossible:
        return pieces[0]
    answer = example.answers[0]
    return max(pieces, key=lambda piece: min(answer.start_char - piece.start_char,
                                             piece.end_char - answer.end_char))
