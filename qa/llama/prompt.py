r"""The prompt, defined once: passage, question and answer as token ids.

A prompt is the concatenation of *separately encoded* parts, for training, every decoder and every test:

    instruction   BOS, what to do, demonstrations: the same for every question of a run
    passage       shared by all questions about it, so that it is read once (packing.py, reading.py)
    question      the words between passage and question, the question, and the cue to answer
    answer        the text and the end token (end_tokens.py)

`plain`, whole:

    {passage}\n{question}\nAnswer: Denver Broncos<eos>

`engineered`, in SmolLM2's chat template (chat.py); `|` marks the seams between the parts:

    <|im_start|>system\n{INSTRUCTION}<|im_end|>\n<|im_start|>user\nPassage:\n|{passage}|\n\nQuestion: {question}
    <|im_end|>\n<|im_start|>assistant\nAnswer:| Denver Broncos<|im_end|>

What the user wrote (passage, question, answer) never becomes a special token, even if it says "</s>".

Seams. A text begins with a space unless the text before it ends in a newline. So no part ends in a space, and the
answer begins with the token " Denver", as it does in the passage and in all that the model has read. SentencePiece
tokenizers put a "▁" before all that is encoded alone ("\n" + "What" would decode to "\n What"): with them, we encode a
part that comes after another with a newline before it, and cut the newline's tokens off.

Made by: train_llama.py, qa/reader.py. Used by: encode.py, candidates.py, candidates_fast.py, reading.py, greedy.py, extract.py,
trace.py, llama/reader.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from qa.errors import UserError
from qa.llama.chat import DATE, PLAIN_FRAME, chat_frame
from qa.llama.demonstrations import Demonstration
from qa.llama.end_tokens import find_end_tokens
from qa.llama.wording import INSTRUCTION, REFUSAL, REFUSAL_INSTRUCTION, ask, one_line, space_after
from qa.schema import FLAG, TEXT, check_fields, list_of, object_of, one_of

CHUNK = 1000  # texts tokenised at a time: bounds the memory of the tokenizer's own objects
SETTINGS = {"kind": one_of("plain", "engineered"), "is_v2": FLAG, "instruction": TEXT, "date": TEXT,
            "demonstrations": list_of(object_of(TEXT))}


class PromptTemplate:
    """How a question is put to one model. Equal `settings` and tokenizers give equal ids.

    kind: "plain" or "engineered"; only the engineered prompt shows demonstrations, instruction and date.
    is_v2: the data has unanswerable questions; their answer is `refusal`.
    """

    def __init__(self, tokenizer, kind: str = "plain", is_v2: bool = False, demonstrations: Sequence[Demonstration] = (),
                 instruction: str = "", date: str = DATE):
        assert kind in ("plain", "engineered"), kind
        if kind == "plain" and demonstrations:
            raise UserError("--shots: the plain prompt has no demonstrations; use --prompt engineered")
        self.tokenizer, self.kind, self.is_v2, self.date = tokenizer, kind, is_v2, date
        self.refusal = REFUSAL if is_v2 else None
        self.instruction = instruction or (f"{INSTRUCTION} {REFUSAL_INSTRUCTION}" if is_v2 else INSTRUCTION)
        self.demonstrations = tuple(demonstrations)
        a = tokenizer("a", add_special_tokens=False).input_ids
        self._adds_space = tokenizer.decode(a + a) != "aa"
        for shown in self.demonstrations:  # they are encoded with the chat template's own special tokens
            text = ask(shown.passage, shown.question) + shown.answer
            if self._encode(text) != self._encode(text, is_user=True):
                raise UserError(f"--shots: the demonstration {shown.question!r} has the text of a special token of the "
                                "model in it, which would end a turn; draw others with another --data-seed")

        is_plain = kind == "plain"
        self._frame = PLAIN_FRAME if is_plain else chat_frame(tokenizer, self.instruction, self.demonstrations, date)
        bos_ids = _bos_ids(tokenizer) if is_plain or not tokenizer.chat_template else []  # a chat template writes BOS itself
        self.instruction_ids: list[int] = bos_ids + self._encode(self._frame.before_passage, is_first=True)
        limit = getattr(tokenizer, "num_embeddings", len(tokenizer))
        if max([*self.instruction_ids, *self.question_ids("")], default=0) >= limit:
            raise UserError(f"--prompt {kind}: the tokenizer makes tokens of it for which the model has no embedding; copy the "
                            "base model's tokenizer files again, or resize the embeddings with transformers")
        self.end_token_id, self.end_token_ids, self.closing_token_ids = find_end_tokens(tokenizer, self._frame.after_answer)

    def settings(self) -> dict:
        """All that decides on the ids, beside the tokenizer; JSON."""
        shots = [{"context": shot.passage, "question": shot.question, "answer": shot.answer} for shot in self.demonstrations]
        return {"kind": self.kind, "is_v2": self.is_v2, "instruction": self.instruction, "date": self.date,
                "demonstrations": shots}

    @classmethod
    def from_settings(cls, tokenizer, settings: dict) -> PromptTemplate:
        try:
            check_fields(settings, "prompt", SETTINGS)
            shots = [Demonstration(shot["context"], shot["question"], shot["answer"]) for shot in settings["demonstrations"]]
        except (UserError, KeyError) as error:
            raise UserError(f"the adapter's prompt settings are damaged ({error}); give --prompt") from None
        return cls(tokenizer, **{name: settings[name] for name in SETTINGS} | {"demonstrations": shots})

    def for_data(self, is_v2: bool) -> PromptTemplate:
        """The same prompt for data of either version: a model that has learnt to refuse still may, and v2.0 needs a refusal."""
        return self if self.is_v2 or not is_v2 else self.from_settings(self.tokenizer, self.settings() | {"is_v2": True})

    def passage_ids(self, passage: str) -> list[int]:
        before = self._frame.before_passage
        return self._encode(space_after(before) + passage, is_user=True, is_first=not before)

    def question_ids(self, question: str, max_tokens: int | None = None) -> list[int]:
        """The question in its labels, and the cue. At most `max_tokens` tokens of the question are kept."""
        return self.all_question_ids([question], max_tokens)[0]

    def all_question_ids(self, questions: Sequence[str], max_tokens: int | None = None) -> list[list[int]]:
        before = self._frame.before_question
        label, cue = self._encode(before), self._encode(self._frame.cue)
        texts = self._encode_batch([space_after(before) + question.strip() for question in questions], is_user=True)
        return [label + ids[:max_tokens] + cue for ids in texts]

    def answer_ids(self, text: str) -> list[int]:
        """The answer and its end token."""
        return self.all_answer_ids([text])[0]

    def all_answer_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids + [self.end_token_id] for ids in self.encode_within_answer(list(map(one_line, texts)), begin=True)]

    def encode_within_answer(self, texts: Sequence[str], begin: bool) -> list[list[int]]:
        """Parts of answers, many at a time.

        begin: each text is the start of an answer. Else it is inside an answer, and is encoded with the spaces that it has.
        """
        return self._encode_batch([space_after(self._frame.cue) + text if begin else text for text in texts], is_user=True)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The answer's text: no special tokens, cut at the first newline, without spaces at its edges."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.split("\n")[0].strip()

    def _encode(self, text: str, is_user: bool = False, is_first: bool = False) -> list[int]:
        """A part's ids. `is_user`: special tokens in it are mere text. `is_first`: it begins the prompt."""
        return self._encode_batch([text], is_user, is_first)[0]

    def _encode_batch(self, texts: Sequence[str], is_user: bool, is_first: bool = False) -> list[list[int]]:
        if not texts or len(texts) > CHUNK:
            chunks = (texts[begin : begin + CHUNK] for begin in range(0, len(texts), CHUNK))
            return [ids for chunk in chunks for ids in self._encode_batch(chunk, is_user, is_first)]
        has_newline = self._adds_space and not is_first
        backend = self.tokenizer.backend_tokenizer  # transformers' own call takes twice as long
        backend.encode_special_tokens = is_user
        if not has_newline:
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        encodings = backend.encode_batch(["\n" + text if text else "" for text in texts], add_special_tokens=False)
        return [_without_newline(text, encoding.ids, encoding.offsets) for text, encoding in zip(texts, encodings, strict=True)]


def _without_newline(text: str, ids: list[int], offsets: list[tuple[int, int]]) -> list[int]:
    """The ids of `text`, which was encoded with a newline before it."""
    num_newline = sum(end_char <= 1 for _, end_char in offsets) if text else 0
    assert not text or offsets[num_newline][0] == 1, f"the tokenizer merges a newline with {text[:9]!r}"
    return ids[num_newline:]


def _bos_ids(tokenizer) -> list[int]:
    """What the tokenizer puts before a text by itself: BOS, or nothing."""
    alone, full = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    return next(full[:i] for i in range(len(full)) if full[i : i + len(alone)] == alone)
