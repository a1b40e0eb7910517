"""Passages in, windows `[CLS] question [SEP] passage [SEP]` out: what BERT reads, with the labels that it learns.

A passage that does not fit is cut into windows that overlap by `overlap` tokens, so that an answer at the edge of one window
stands well inside the next. (transformers calls the overlap "stride"; in Google's BERT `doc_stride` is the step.)

    passage  t0 .. t599,  question of 10 tokens,  max_length 384,  overlap 128
    capacity 384 - 10 - 3 = 371;  windows t0..t370, t243..t599     (step 371 - 128 = 243)

Each passage and each question is tokenised once. Windows live in flat arrays, not in objects: 88,000 questions take some
hundred megabytes. Used by: train_bert.py (batches of windows), bert/reader.py (scores back to characters, through `offsets`).

N windows   T tokens of all windows together
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qa.data.squad import Example, Passage, Summary
from qa.errors import UserError

NUM_SPECIAL = 3  # [CLS], [SEP], [SEP]
UNUSUAL_SHARE = 0.1  # of tokens that are unknown; in all of SQuAD it is 0.02%, where every capital is unknown 15%
FIRST_MARK = 0x300  # no character before it is a mark
JOINER = "\N{ZERO WIDTH JOINER}"
SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
CHUNK = 512  # passages tokenised at a time: bounds the memory of the tokenizer's own objects


@dataclass
class Windows:
    """All windows of a list of passages; window n has the tokens `tokens[bounds[n]:bounds[n + 1]]`.

    Positions (`passage`, `null_token`, `start_token`, `end_token`) count from the window's first token.
    """

    tokens: np.ndarray  # [T] int32
    offsets: np.ndarray  # [T, 2] int32: start and end (exclusive) character, marks included; 0, 0 outside the passage
    bounds: np.ndarray  # [N + 1] int64
    passage: np.ndarray  # [N, 2] int32: first passage token, one past the last
    question: np.ndarray  # [N] int32: index of the example, counted over all passages; ascending
    null_token: np.ndarray  # [N] int32: the position that says "no answer in this window": [CLS]
    start_token: np.ndarray  # [N] int32: label; null_token if the answer is not in the window
    end_token: np.ndarray  # [N] int32: label, inclusive
    pad_token: int
    summary: Summary = field(default_factory=Summary)

    def __len__(self) -> int:
        return len(self.question)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)  # [N]

    def batch(self, rows: np.ndarray, device: torch.device | str) -> dict[str, Tensor]:
        """Pad some windows to the longest of them. All values int64 [B, L] or [B]; `attention_mask` is boolean."""
        lengths = self.lengths[rows]
        column = np.arange(lengths.max())
        real = column < lengths[:, None]  # [B, L]
        tokens = np.full(real.shape, self.pad_token, dtype=np.int64)
        tokens[real] = np.concatenate([self.tokens[self.bounds[row]:self.bounds[row + 1]] for row in rows])
        is_passage = real & (column >= self.passage[rows, :1])  # the last [SEP] is of type 1, as in BERT's pretraining
        arrays = {"input_ids": tokens, "attention_mask": real, "token_type_ids": is_passage.astype(np.int64),
                  "start_token": self.start_token[rows].astype(np.int64),
                  "end_token": self.end_token[rows].astype(np.int64)}
        return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}


def question_share(max_length: int, overlap: int) -> int:
    """The most tokens that a question may take: half of the window, and less if the overlap would not fit else."""
    share = min((max_length - NUM_SPECIAL) // 2, max_length - NUM_SPECIAL - overlap - 1)
    if share < 1:
        raise UserError(f"--overlap {overlap}: must leave room in a window of --max-length {max_length} for the question "
                        f"and {NUM_SPECIAL} special tokens; use at most {max(0, max_length // 2 - NUM_SPECIAL)}")
    return share


def make_windows(passages: list[Passage], tokenizer, max_length: int, overlap: int) -> Windows:
    """Build the windows of all questions on `passages`, labels included where there are answers.

    Args:
        tokenizer: a fast BERT tokenizer (see weights.load_tokenizer).
        max_length: tokens of a window, special tokens included.
        overlap: passage tokens that two neighbouring windows of a passage share.

    Raises:
        UserError: the overlap leaves no room.
    """
    share = question_share(max_length, overlap)
    summary = Summary()
    parts = list(_window_parts(passages, tokenizer, max_length, overlap, share, summary))
    lengths = np.fromiter((len(part[0]) for part in parts), dtype=np.int64, count=len(parts))
    columns = np.array([part[2:] for part in parts], dtype=np.int32).reshape(len(parts), 5)
    tokens = np.concatenate([part[0] for part in parts])
    offsets = np.zeros((len(tokens), 2), dtype=np.int32)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    for row, (first, past) in enumerate(columns[:, 1:3]):
        offsets[bounds[row] + first:bounds[row] + past] = parts[row][1]
    null_token = np.zeros(len(parts), dtype=np.int32)  # [CLS] stands first in every window
    return Windows(tokens, offsets, bounds, columns[:, 1:3].copy(), columns[:, 0].copy(), null_token,
                   columns[:, 3].copy(), columns[:, 4].copy(), tokenizer.pad_token_id, summary)


def _window_parts(passages, tokenizer, max_length, overlap, share, summary) -> Iterator[tuple]:
    """(tokens, passage offsets, example index, first passage token, one past the last, start label, end label)."""
    cls, sep = np.int32(tokenizer.cls_token_id), np.int32(tokenizer.sep_token_id)
    index = 0
    for passage, encoding, questions in _encoded_passages(passages, tokenizer):
        token_ids = np.array(encoding.ids, dtype=np.int32)
        offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)
        unknown = np.flatnonzero(token_ids == tokenizer.unk_token_id)
        if len(unknown) > UNUSUAL_SHARE * len(token_ids):
            first, past = offsets[unknown[0]]
            summary.add(f"passage with more than {UNUSUAL_SHARE:.0%} of unknown tokens ({tokenizer.unk_token}): is this the "
                        "model's own tokenizer, and the model one for this language?", repr(passage.text[first:past]))
        answer_tokens = _answer_tokens(passage.examples, offsets)  # [questions of the passage, 2]
        offsets = _with_marks(offsets, passage.text)
        for example, question, (start, end) in zip(passage.examples, questions, answer_tokens, strict=True):
            if len(question) > share:
                summary.add(f"question longer than {share} tokens, truncated", example.id)
                question = question[:share]
            head = np.concatenate([[cls], question, [sep]]).astype(np.int32)
            capacity = max_length - NUM_SPECIAL - len(question)
            if example.answers and start > end:
                summary.add("answer made of characters that the tokenizer drops, labelled as absent", example.id)
            for begin in _window_starts(len(token_ids), capacity, overlap):
                piece = token_ids[begin:begin + capacity]
                inside = begin <= start <= end < begin + len(piece)
                shift = len(head) - begin
                labels = (start + shift, end + shift) if inside else (0, 0)
                yield (np.concatenate([head, piece, [sep]]), offsets[begin:begin + capacity], index, len(head),
                       len(head) + len(piece), *labels)
            index += 1


def _encoded_passages(passages: list[Passage], tokenizer) -> Iterator[tuple]:
    """(passage, its encoding, its questions' token ids), chunk by chunk."""
    backend = tokenizer.backend_tokenizer
    for begin in range(0, len(passages), CHUNK):
        chunk = passages[begin:begin + CHUNK]
        encodings = backend.encode_batch([passage.text for passage in chunk], add_special_tokens=False)
        texts = [example.question for passage in chunk for example in passage.examples]
        questions = iter(backend.encode_batch_fast(texts, add_special_tokens=False))
        for passage, encoding in zip(chunk, encodings, strict=True):
            yield passage, encoding, [next(questions).ids for _ in passage.examples]


def _answer_tokens(examples: list[Example], offsets: np.ndarray) -> np.ndarray:
    """Character span to token span, for all questions of a passage at once.

    The first token that ends behind the answer's first character, and the last token that starts before its end:

        "1895-1943" is the tokens 1895 | - | 1943 with offsets (0,4) (4,5) (5,9); the answer "1895" (0,4) gives token 0;
        "Japanese" in "Japaneses" gives the whole token, which is the nearest label that there is.

    Returns:
        int64 [questions, 2], inclusive; (1, 0), which is no span, for a question without a located answer.
    """
    chars = np.array([(example.answers[0].start_char, example.answers[0].end_char) if example.answers else (0, 0)
                      for example in examples])
    start = np.searchsorted(offsets[:, 1], chars[:, 0], side="right")
    end = np.searchsorted(offsets[:, 0], chars[:, 1], side="left") - 1
    span = np.stack([start, end], axis=1)
    span[[not example.answers for example in examples]] = (1, 0)
    return span


def _with_marks(offsets: np.ndarray, text: str) -> np.ndarray:
    """Ends moved behind the marks that follow, which belong to the character before them: no answer may lose its last accent.

    An uncased BERT tokenizer drops accents: "de\u0301" ("dé" in two code points and a mark) is the token "de" with the offsets
    (0, 2), and an answer that ends with it would be "de". Here they are (0, 3).
    """
    if text.isascii():
        return offsets
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    follows = codes >= FIRST_MARK  # [characters]
    follows[follows] = [_follows(text, place) for place in np.flatnonzero(follows)]
    stops = np.append(np.flatnonzero(~follows), len(text))
    return np.stack([offsets[:, 0], stops[np.searchsorted(stops, offsets[:, 1])]], axis=1).astype(offsets.dtype)


def _follows(text: str, place: int) -> bool:
    """Whether the character is a mark of the one before it: an accent, a vowel sign, or a part of an emoji."""
    character, before = text[place], text[max(place - 1, 0):place]
    if character == JOINER or before == JOINER:  # two emoji made one; between letters a joiner says something else
        return unicodedata.category(text[place + 1:place + 2] or " " if character == JOINER else character) == "So"
    return unicodedata.category(character).startswith("M") or character in SKIN_TONES


def _window_starts(num_tokens: int, capacity: int, overlap: int) -> range:
    """First passage token of every window; the last window is the first that reaches the passage's end."""
    if num_tokens <= capacity:
        return range(1)
    step = capacity - overlap
    return range(0, num_tokens - capacity + step, step)
