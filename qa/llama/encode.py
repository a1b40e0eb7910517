"""Passages -> prompts, encoded; a passage too long for the model in overlapping pieces.

BERT reads windows (qa/bert/windows.py). LLaMA reads nearly every passage whole: we cut a passage only if it does not fit into
`max_length` tokens together with the longest question and answer of the data. Training puts a question to the one piece that
shows its answer best. Decoding puts it to every piece, and keeps the most probable answer.

Input: Passages and a PromptTemplate (prompt.py, which makes the token ids). Used by: train_llama.py and llama/reader.py, which
hand the prompts to packing.py and reading.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from qa.data.squad import Example, Passage
from qa.errors import UserError
from qa.llama.prompt import PromptTemplate
from qa.llama.wording import answer_text

Found = TypeVar("Found")  # what a decoder found for one Prompt: greedy.py's Generation or search.py's Extraction


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """A passage, or a piece of one, encoded. All prompts about it hold the same object, so packing.py sees who shares a row."""

    ids: list[int]
    text: str  # the passage's characters start_char to end_char (exclusive)
    start_char: int

    @property
    def end_char(self) -> int:
        return self.start_char + len(self.text)


@dataclass(frozen=True, eq=False, slots=True)
class Prompt:
    """A question about a passage, encoded."""

    example_index: int  # which of the examples, counted over all passages
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
        max_new_tokens: 0 in training: each example gives one prompt with its answer, and must be trainable. In decoding: the
            most tokens of an answer. Each example gives one prompt per piece, with room for so long an answer.

    Returns:
        The prompts, and one line for each kind of cut that was made, to print.
    """
    training = max_new_tokens == 0
    texts = [passage.text for passage in passages for _ in passage.examples]
    examples = [example for passage in passages for example in passage.examples]
    answers = template.all_answer_ids(list(map(answer_text, examples))) if training else [[]] * len(examples)
    questions, notes = _encode_questions(template, examples, max_question_tokens(max_length))
    longest_tail = max((len(question) + (len(answer) or max_new_tokens)
                        for question, answer in zip(questions, answers, strict=True)), default=0)
    room = max_length - len(template.instruction_ids) - longest_tail
    if room < 8:
        raise UserError(f"--max-length {max_length}: instruction ({len(template.instruction_ids)} tokens), question and "
                        f"answer ({longest_tail}) leave no room for a passage; give more, or fewer --shots")
    overlap = min(overlap, room // 2)
    pieces_by_text = {text: split_passage(template, text, room, overlap) for text in dict.fromkeys(texts)}
    prompts = []
    for index, (text, example, question, answer) in enumerate(zip(texts, examples, questions, answers, strict=True)):
        pieces = pieces_by_text[text]
        for piece in [_piece_with_answer(pieces, example)] if training else pieces:
            prompts.append(Prompt(index, example.id, piece, question, answer))
    if num_long := sum(len(pieces) > 1 for pieces in pieces_by_text.values()):
        notes.append(f"{num_long} of {len(pieces_by_text)} passages are too long for {max_length} tokens: read in pieces "
                     f"of at most {room} tokens that share {overlap}")
    return prompts, notes


def max_question_tokens(max_length: int) -> int:
    """The most tokens that a question may take, its labels and the cue included."""
    return max_length // 4


def passages_and_lengths(prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """What the batch plan needs: which passage each prompt is about, and its tokens without the instruction; int64 [N] each."""
    numbers: dict[Piece, int] = {}
    passage = [numbers.setdefault(prompt.piece, len(numbers)) for prompt in prompts]
    lengths = [len(prompt.piece.ids) + len(prompt.question_ids) + len(prompt.answer_ids) for prompt in prompts]
    return np.array(passage, dtype=np.int64), np.array(lengths, dtype=np.int64)


def group_by_example(found: Iterable[Found]) -> list[tuple[list[Found], float | None]]:
    """For each example: what a decoder found in each piece of its passage; on v2.0 also the log P of its refusal.

    It is the smallest of the pieces' refusals: a passage has an answer if one of its pieces has.
    """
    by_example: dict[int, list[Found]] = {}
    for one in found:
        by_example.setdefault(one.prompt.example_index, []).append(one)
    return [(group, min((one.refusal_log_prob for one in group if one.refusal_log_prob is not None), default=None))
            for group in by_example.values()]


def all_tokens(prompts: Sequence[Prompt]) -> np.ndarray:
    """Every token of the prompts, a passage's once; int32, for a fingerprint of what a run learns from."""
    parts = [piece.ids for piece in dict.fromkeys(prompt.piece for prompt in prompts)]
    parts += [ids for prompt in prompts for ids in (prompt.question_ids, prompt.answer_ids)]
    return np.concatenate([np.array(ids, dtype=np.int32) for ids in parts])


def split_passage(template: PromptTemplate, text: str, max_tokens: int, overlap: int) -> list[Piece]:
    """The passage, or pieces of at most `max_tokens` tokens; neighbours share `overlap` tokens."""
    ids = template.passage_ids(text)
    if len(ids) <= max_tokens:
        return [Piece(ids, text, 0)]
    assert 0 <= overlap < max_tokens, (overlap, max_tokens)
    encoding = template.tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    starts, ends = zip(*encoding["offset_mapping"], strict=True)
    ends = (*ends[:-1], len(text))  # the last piece takes what no token covers at the end
    pieces, first = [], 0
    while not pieces or pieces[-1].end_char < len(text):
        start_char = starts[first] if pieces else 0
        last = min(first + max_tokens, len(ends)) - 1
        while len(ids := template.passage_ids(text[start_char : ends[last]])) > max_tokens and last > first:
            last -= 1  # a piece may take a token more than the same text within the passage
        pieces.append(Piece(ids, text[start_char : ends[last]], start_char))
        first = max(last + 1 - overlap, first + 1)
    return pieces


def _encode_questions(template: PromptTemplate, examples: Sequence[Example],
                      max_tokens: int) -> tuple[list[list[int]], list[str]]:
    questions = template.all_question_ids([example.question for example in examples])
    long = [index for index, ids in enumerate(questions) if len(ids) > max_tokens]
    for index in long:
        questions[index] = template.question_ids(examples[index].question, max_tokens)
    notes = [f"{len(long)} questions of more than {max_tokens} tokens were cut (e.g. {examples[long[0]].id})"] if long else []
    return questions, notes


def _piece_with_answer(pieces: list[Piece], example: Example) -> Piece:
    """The piece in which the answer is furthest from an edge; the first one for an unanswerable question."""
    if example.is_impossible:
        return pieces[0]
    answer = example.answers[0]
    return max(pieces, key=lambda piece: min(answer.start_char - piece.start_char, piece.end_char - answer.end_char))
