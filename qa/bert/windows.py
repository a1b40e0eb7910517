"""Passages in, windows `[CLS] question [SEP] passage [SEP]` out: what BERT reads, with the labels that it learns.

    position    0    1    2   3   4    5    6    7    8    9   10      passage_range (5, 10), the second number exclusive
    token     [CLS] who came  ? [SEP] ann  and  bob came   . [SEP]     the answer "bob": start_token 7, end_token 7

A passage that is too long for one window is cut into several. Two neighbours share `overlap` tokens, so that an answer at the
edge of one window is inside the next. (`doc_stride` is this overlap in transformers' run_qa.py, but the step in Google's BERT.)
RoBERTa's tokenizer puts two separators between question and passage, which leaves room for one token less.

    passage  t0 .. t599,  question of 10 tokens,  max_length 384,  overlap 128
    capacity 384 - 10 - 3 = 371;  windows t0..t370, t243..t599     (step 371 - 128 = 243)

Each passage and each question is tokenised once. Windows are flat arrays, not objects: 88,000 questions take 340 MB.
Used by: train_bert.py (batches of windows), bert/reader.py (scores back to characters, through `offsets`).

Letters: N windows, T tokens of all windows together, B windows of a batch, L tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Encoding
from torch import Tensor

from qa.data.marks import ends_after_marks
from qa.data.squad import Example, Passage, Summary
from qa.errors import UserError

NUM_SPECIAL = 3  # [CLS], [SEP], [SEP]; RoBERTa has 4
NO_ANSWER = 0  # the position of [CLS]: the label where the window lacks the answer, and the place of the null score
IGNORED = -100  # a label that counts for nothing: cross-entropy skips it
MAX_UNKNOWN_SHARE = 0.1  # share of [UNK] in a passage. In SQuAD it is 0.02%, without capitals in the vocabulary 15%
IS_BLANK = np.array([chr(code).isspace() for code in range(0x3002)])  # the last blank of Unicode is U+3000
CHUNK = 512  # passages tokenised at a time: bounds the memory of the tokenizer's own objects


@dataclass
class Windows:
    """All windows of a list of passages; window n has the tokens `tokens[bounds[n]:bounds[n + 1]]`.

    Positions (`passage_range`, `start_token`, `end_token`) count from the window's first token.
    """

    tokens: np.ndarray  # [T] int32
    offsets: np.ndarray  # [T, 2] int32: start and end (exclusive) character in the passage; 0, 0 outside the passage
    bounds: np.ndarray  # [N + 1] int64
    passage_range: np.ndarray  # [N, 2] int32: first passage token, one past the last
    example_index: np.ndarray  # [N] int32: number of the example, counted over all passages; ascending
    start_token: np.ndarray  # [N] int32: label; NO_ANSWER if the answer is not in the window
    end_token: np.ndarray  # [N] int32: label, inclusive
    pad_token: int
    summary: Summary

    def __len__(self) -> int:
        return len(self.example_index)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)  # [N]

    @property
    def blanks(self) -> np.ndarray:
        """Indices into `tokens`: passage tokens that are blanks. Of "a  b" RoBERTa makes a | blank | b, BERT never has any."""
        first, past = (self.bounds[:-1, None] + self.passage_range).T
        step = np.bincount(first, minlength=len(self.tokens) + 1) - np.bincount(past, minlength=len(self.tokens) + 1)
        in_passage = step.cumsum()[:-1] > 0
        return np.flatnonzero(in_passage & (self.offsets[:, 0] >= self.offsets[:, 1]))

    def batch(self, rows: np.ndarray, device: torch.device | str) -> dict[str, Tensor]:
        """Pad some windows to the longest of them. All values int64 [B, L] or [B]; `attention_mask` is boolean.

        No windows: the first one without a label, for a pass without effect.
        """
        if not len(rows):
            no_label = torch.tensor([IGNORED], device=device)
            return self.batch(np.array([0]), device) | {"start_token": no_label, "end_token": no_label}
        lengths = self.bounds[rows + 1] - self.bounds[rows]
        position = np.arange(lengths.max())
        real = position < lengths[:, None]  # [B, L]
        tokens = np.full(real.shape, self.pad_token, dtype=np.int64)
        tokens[real] = np.concatenate([self.tokens[self.bounds[row]:self.bounds[row + 1]] for row in rows])
        is_passage = real & (position >= self.passage_range[rows, :1])  # the last [SEP] is of type 1, as in BERT's pretraining
        arrays = {"input_ids": tokens, "attention_mask": real, "token_type_ids": is_passage.astype(np.int64),
                  "start_token": np.int64(self.start_token[rows]), "end_token": np.int64(self.end_token[rows])}
        return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}


class _Window(NamedTuple):
    """One window, before it goes into the flat arrays."""

    tokens: np.ndarray  # [tokens of the window]
    passage_offsets: np.ndarray  # [tokens of the passage in this window, 2]
    passage_range: tuple[int, int]
    example_index: int
    start_token: int
    end_token: int


def num_special_tokens(tokenizer) -> int:
    """Of a window, as the tokenizer itself joins two texts; of one that joins none, as BERT's."""
    return tokenizer.backend_tokenizer.num_special_tokens_to_add(is_pair=True) or NUM_SPECIAL


def max_question_tokens(max_length: int, overlap: int, num_special: int = NUM_SPECIAL) -> int:
    """The most tokens that a question may take: half of the window, or less where the overlap needs more room."""
    most = min((max_length - num_special) // 2, max_length - num_special - overlap - 1)
    if most < 1:
        raise UserError(f"--overlap {overlap}: must leave room in a window of --max-length {max_length} for the question "
                        f"and {num_special} special tokens; use at most {max(0, max_length // 2 - num_special)}")
    return most


def make_windows(passages: list[Passage], tokenizer, max_length: int, overlap: int) -> Windows:
    """Build the windows of all questions on `passages`, with labels where there are answers.

    tokenizer: a fast BERT tokenizer (see weights.load_tokenizer). max_length: tokens of a window, special tokens included.

    Raises:
        UserError: the overlap leaves no room.
    """
    summary = Summary()
    found = _all_windows(passages, tokenizer, max_length, overlap, summary)
    tokens, passage_offsets, *numbers = zip(*found, strict=True)  # one tuple for each field of _Window
    passage_range, example_index, start_token, end_token = (np.array(column, dtype=np.int32) for column in numbers)
    bounds = np.cumsum([0, *map(len, tokens)])
    offsets = np.zeros((bounds[-1], 2), dtype=np.int32)
    for part, first, past in zip(passage_offsets, *(bounds[:-1] + passage_range.T), strict=True):
        offsets[first:past] = part
    return Windows(np.concatenate(tokens), offsets, bounds, passage_range, example_index, start_token, end_token,
                   tokenizer.pad_token_id, summary)


def _all_windows(passages: list[Passage], tokenizer, max_length: int, overlap: int, summary: Summary) -> Iterator[_Window]:
    cls, sep, num_special = tokenizer.cls_token_id, tokenizer.sep_token_id, num_special_tokens(tokenizer)
    separators = [sep] * (num_special - 2)  # between question and passage
    most = max_question_tokens(max_length, overlap, num_special)
    example_index = 0
    for passage, encoding, questions in _encoded_passages(passages, tokenizer):
        token_ids = np.array(encoding.ids, dtype=np.int32)
        offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)
        unknown = np.flatnonzero(token_ids == tokenizer.unk_token_id)
        if len(unknown) > MAX_UNKNOWN_SHARE * len(token_ids):
            first, past = offsets[unknown[0]]
            summary.add(f"passage with more than {MAX_UNKNOWN_SHARE:.0%} of unknown tokens ({tokenizer.unk_token}): is this "
                        "the model's own tokenizer, and the model one for this language?", repr(passage.text[first:past]))
        answer_tokens = _answer_tokens(passage.examples, offsets)  # [questions of the passage, 2]
        # Now that the labels are made, token ends move to after accents (data/marks.py). Moved earlier, a gold answer that
        # begins with an accent would get the token before it as its label.
        offsets = without_blanks(ends_after_marks(offsets, passage.text), passage.text)
        for example, question, (start, end) in zip(passage.examples, questions, answer_tokens, strict=True):
            if len(question) > most:
                summary.add(f"question longer than {most} tokens, truncated", example.id)
            if example.answers and start > end:
                summary.add("answer made of characters that the tokenizer drops, labelled as absent", example.id)
            before = np.array([cls, *question[:most], *separators], dtype=np.int32)  # what comes before the passage
            capacity = max_length - len(before) - 1
            # No window begins in the last `overlap` tokens: the one before has them. max(1, ..): an empty passage has one.
            for begin in range(0, max(1, len(token_ids) - overlap), capacity - overlap):
                part = token_ids[begin:begin + capacity]
                has_answer = begin <= start <= end < begin + len(part)
                shift = len(before) - begin  # from a position in the passage to one in the window
                labels = (start + shift, end + shift) if has_answer else (NO_ANSWER, NO_ANSWER)
                yield _Window(np.concatenate([before, part, [np.int32(sep)]]), offsets[begin:begin + capacity],
                              (len(before), len(before) + len(part)), example_index, *labels)
            example_index += 1


def without_blanks(offsets: np.ndarray, text: str) -> np.ndarray:
    """Move starts after blanks, and ends before them; [tokens, 2]. A blank token's start is then at its end or after it.

    No answer begins or ends with a blank. In some tokenizers a token has the space before its word.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    places = np.flatnonzero(~IS_BLANK[np.minimum(codes, len(IS_BLANK) - 1)])  # of the characters that are no blanks
    starts = np.append(places, len(text))[np.searchsorted(places, offsets[:, 0])]
    ends = np.append(0, places + 1)[np.searchsorted(places, offsets[:, 1])]
    return np.stack([starts, ends], axis=1).astype(offsets.dtype)


def _encoded_passages(passages: list[Passage], tokenizer) -> Iterator[tuple[Passage, Encoding, list[list[int]]]]:
    """Every passage, its encoding, and its questions' token ids."""
    backend = tokenizer.backend_tokenizer
    for begin in range(0, len(passages), CHUNK):
        chunk = passages[begin:begin + CHUNK]
        encodings = backend.encode_batch([passage.text for passage in chunk], add_special_tokens=False)
        texts = [example.question for passage in chunk for example in passage.examples]
        questions = iter(backend.encode_batch_fast(texts, add_special_tokens=False))
        for passage, encoding in zip(chunk, encodings, strict=True):
            yield passage, encoding, [next(questions).ids for _ in passage.examples]


def _answer_tokens(examples: list[Example], offsets: np.ndarray) -> np.ndarray:
    """Characters to tokens, for all questions of a passage at once: the tokens that have a character of the answer.

    The first token that ends after the answer's first character, and the last token that starts before the answer's end:

        "1895-1943" is the tokens 1895 | - | 1943 with offsets (0,4) (4,5) (5,9); the answer "1895" (0,4) gives token 0;
        "Japanese" in "Japaneses" gives the whole token, which is the nearest label that there is.

    Returns int64 [questions, 2], inclusive; (1, 0), which is no span, for a question without an answer.
    """
    chars = np.array([(example.answers[0].start_char, example.answers[0].end_char) if example.answers else (0, 0)
                      for example in examples])
    start = np.searchsorted(offsets[:, 1], chars[:, 0], side="right")
    end = np.searchsorted(offsets[:, 0], chars[:, 1], side="left") - 1
    span = np.stack([start, end], axis=1)
    span[[not example.answers for example in examples]] = (1, 0)
    return span
