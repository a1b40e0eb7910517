r"""The prompt, defined once: passage, question and answer as token ids.

A prompt is the concatenation of *separately encoded* segments, for training, every decoder and every test:

    prefix      BOS, instruction, demonstrations: the same for every question of a run
    passage     shared by all questions about it, so that it is read once (packing.py, generate.py)
    question    what stands between passage and question, the question, and the cue to answer
    answer      the text and the end token

`plain`, whole:

    {passage}\n{question}\nAnswer: Denver Broncos<eos>

`engineered` in a chat template (this one is SmolLM2's; `|` marks the seams of the segments):

    <|im_start|>system\n{INSTRUCTION}<|im_end|>\n<|im_start|>user\nPassage:\n|{passage}|\n\nQuestion: {question}
    <|im_end|>\n<|im_start|>assistant\nAnswer:| Denver Broncos<|im_end|>

The assistant's turn is begun for the model: small ones then answer more briefly. The template is rendered with
sentinels for passage and question, and cut there; a date in it is fixed (Llama 3's prints today's). If the template
leaves the instruction out, the user's turn says it; one that drops, changes or repeats anything else is refused.
What the user wrote (passage, question, answer) never becomes a special token, even if it says "</s>".

Seams. A text begins with a blank unless the text before it ends in a newline; so no segment ends in a blank, and the
answer begins with the token " Denver", as it does in the passage and in all that the model has read. SentencePiece
tokenizers put a "▁" before all that is encoded alone ("\n" + "What" would decode to "\n What"): there, a segment
that stands behind another is encoded behind a newline, whose tokens are then cut off.

The end. An answer ends at a special token or at the first newline. `end_token_ids` are the special tokens and
every token whose text is blank up to its first newline ("\n", "\n\n", " \n"); P(end) is the sum over them. Tokens
with the answer's last characters *and* a newline (".\n" in Llama 3), `closing_token_ids`, end it too, and the text
is cut. Training puts `end_token_id` behind the answer, which is one of these: the token that ends the assistant's
turn, else eos. There other tools stop as well.

The wording was chosen on 101 questions of six held-out *training* articles (SmolLM2-135M-Instruct, bf16, greedy, at most
16 tokens, texts before grounding):

    EM    F1
    0.0   1.7   plain: 84 of the answers are empty, the model ends them at once
    0.0  17.0   engineered, "... the shortest exact span copied from the passage. Write the span only.", no cue (153 questions)
    6.9  18.7   the same, and "Answer:" begun for the model
    7.9  19.1   "... with one to five words copied from it. Never write a sentence."
    7.9  19.9   "Extract the answer ... a few words copied from the passage and nothing else."
    9.9  21.2   INSTRUCTION
    5.0  14.7   the instruction behind the question
   12.9  24.4   the wording of the 6.9 / 18.7, with three demonstrations (--shots 3)

Padding is told by position, never by id: pad = eos in many LLaMAs. Used by: encode.py, generate.py, extract.py.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from qa.data.squad import Example, Passage
from qa.errors import UserError

INSTRUCTION = "Read the passage and answer the question with a short phrase copied from it, not a sentence."
REFUSAL = "unanswerable"
REFUSAL_INSTRUCTION = f'If the passage does not answer the question, write "{REFUSAL}".'
DATE = "26 Jul 2024"  # what Llama 3's template prints where it is told no date
CUE = "Answer:"  # the model goes on behind it
# Sentinels: with characters that a template which escapes or normalises its texts would change.
PASSAGE, QUESTION, ANSWER = (f"⟦{name}  \"'<&>⟧" for name in ("passage", "question", "answer"))


@dataclass(frozen=True)
class Demonstration:
    context: str
    question: str
    answer: str  # the refusal for an unanswerable question


def choose_demonstrations(passages: Sequence[Passage], shots: int, seed: int) -> tuple[Demonstration, ...]:
    """`shots` training questions, on different texts from the shorter half."""
    examples_of: dict[str, list[Example]] = {}
    for passage in passages:
        if trainable := [example for example in passage.examples if example.trainable]:
            examples_of.setdefault(passage.text, []).extend(trainable)
    short = sorted(examples_of, key=len)[: (len(examples_of) + 1) // 2]
    if shots > len(short):
        raise UserError(f"--shots {shots}: more than the training data has to offer, the shorter half of its "
                        f"{len(examples_of)} passages; give at most {len(short)}")
    rng = random.Random(seed)
    chosen = [(text, rng.choice(examples_of[text])) for text in rng.sample(short, shots)]
    return tuple(Demonstration(text, example.question.strip(), one_line(answer_text(example))) for text, example in chosen)


def answer_text(example: Example) -> str:
    """What the model learns to write: the first answer, or the refusal."""
    return REFUSAL if example.is_impossible else example.answers[0].text


def one_line(text: str) -> str:
    """An answer as it is written: a newline within it would end it, and becomes a blank."""
    return re.sub(r"\s*\n\s*", " ", text.strip())


class PromptTemplate:
    """How a question is put to one model. Equal `settings` and tokenizers give equal ids.

    Args:
        kind: "plain" or "engineered".
        is_v2: the data has unanswerable questions; their answer is `refusal`.
        demonstrations, instruction, date: of the engineered prompt.
    """

    def __init__(self, tokenizer, kind: str = "plain", is_v2: bool = False,
                 demonstrations: Sequence[Demonstration] = (), instruction: str = "", date: str = DATE):
        assert kind in ("plain", "engineered"), kind
        if not tokenizer.is_fast:
            raise UserError(f"--model {tokenizer.name_or_path}: its tokenizer gives no character offsets; expected "
                            "a model with a tokenizer.json")
        if kind == "plain" and demonstrations:
            raise UserError("--shots: the plain prompt has no demonstrations; use --prompt engineered")
        self.tokenizer, self.kind, self.is_v2, self.date = tokenizer, kind, is_v2, date
        self.refusal = REFUSAL if is_v2 else None
        self.instruction = instruction or (f"{INSTRUCTION} {REFUSAL_INSTRUCTION}" if is_v2 else INSTRUCTION)
        self.demonstrations = tuple(demonstrations)
        twice = 2 * tokenizer("a", add_special_tokens=False).input_ids
        self._adds_blank = tokenizer.decode(twice) != "aa"
        for shown in self.demonstrations:  # they are encoded with the template's own special tokens
            text = _ask(shown.context, shown.question) + shown.answer
            if self._encode(text) != self._encode(text, is_user=True):
                raise UserError(f"--shots: the demonstration {shown.question!r} has the text of a special token of the "
                                "model in it, which would end a turn; draw others with another --data-seed")
        self._passage_ids: dict[str, list[int]] = {}
        self._token_texts: list[str] = []

        turn_end = self._cut_template()
        has_chat = kind == "engineered" and tokenizer.chat_template  # which writes BOS itself
        bos_ids = [] if has_chat else self._bos_ids()
        self.instruction_ids: list[int] = bos_ids + self._encode(self._before_passage, is_first=True)
        self._find_ends(turn_end)

    def settings(self) -> dict:
        """All that decides on the ids, beside the tokenizer; JSON."""
        return {"kind": self.kind, "is_v2": self.is_v2, "instruction": self.instruction, "date": self.date,
                "demonstrations": [asdict(demonstration) for demonstration in self.demonstrations]}

    @classmethod
    def from_settings(cls, tokenizer, settings: dict) -> PromptTemplate:
        try:
            demonstrations = [Demonstration(**fields) for fields in settings["demonstrations"]]
            return cls(tokenizer, **{**settings, "demonstrations": demonstrations})
        except (KeyError, TypeError) as error:
            raise UserError(f"the adapter's prompt settings are damaged ({error!r}); give --prompt") from None

    def for_data(self, is_v2: bool) -> PromptTemplate:
        """The same prompt for data of either version: whoever has learnt to refuse still does, and v2.0 needs a refusal."""
        return self if self.is_v2 or not is_v2 else self.from_settings(self.tokenizer, self.settings() | {"is_v2": True})

    def passage_ids(self, context: str) -> list[int]:
        """Encoded once per passage, not once per question."""
        if context not in self._passage_ids:
            text = _lead(self._before_passage) + context
            self._passage_ids[context] = self._encode(text, is_user=True, is_first=not self._before_passage)
        return self._passage_ids[context]

    def question_ids(self, question: str, max_tokens: int | None = None) -> list[int]:
        """The question in its labels, and the cue. Of the question at most `max_tokens` tokens are kept."""
        text_ids = self._encode(_lead(self._before_question) + question.strip(), is_user=True)
        return self._encode(self._before_question) + text_ids[:max_tokens] + self._encode(self._cue)

    def answer_ids(self, text: str) -> list[int]:
        """The answer and its end token."""
        return self._encode(_lead(self._cue) + one_line(text), is_user=True) + [self.end_token_id]

    def encode_within_answer(self, texts: Sequence[str], begin: bool) -> list[list[int]]:
        """Pieces of answers, many at a time. `begin`: they begin an answer; else they go on in one, blank and all.

        answer_ids(text)[:-1] == encode_within_answer([one_line(text)], begin=True)[0]
        """
        return self._encode_batch([_lead(self._cue) + text if begin else text for text in texts], is_user=True)

    def token_texts(self) -> list[str]:
        """What each token says, decoded alone."""
        if not self._token_texts:
            decode_batch = self.tokenizer.backend_tokenizer.decode_batch
            self._token_texts = decode_batch([[id] for id in range(len(self.tokenizer))], skip_special_tokens=False)
        return self._token_texts

    def decode(self, token_ids: Sequence[int]) -> str:
        """The answer's text: no special tokens, cut at the first newline, without blanks at its edges."""
        decode = self.tokenizer.decode
        text = decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.split("\n")[0].strip()

    def split_passage(self, context: str, max_tokens: int, overlap: int) -> list[tuple[int, int]]:
        """Character ranges [start, end) of pieces of at most `max_tokens` tokens that share `overlap` tokens."""
        if len(self.passage_ids(context)) <= max_tokens:
            return [(0, len(context))]
        assert 0 <= overlap < max_tokens, (overlap, max_tokens)
        encoding = self.tokenizer(context, add_special_tokens=False, split_special_tokens=True,
                                  return_offsets_mapping=True)
        starts, ends = zip(*encoding["offset_mapping"], strict=True)
        ends = (*ends[:-1], len(context))
        pieces, first = [], 0
        while not pieces or pieces[-1][1] < len(context):
            start_char = starts[first] if pieces else 0
            last = min(first + max_tokens, len(ends)) - 1
            # Encoded alone, a piece may take a token more: what stood before its first word is gone.
            while last > first and len(self.passage_ids(context[start_char : ends[last]])) > max_tokens:
                last -= 1
            pieces.append((start_char, ends[last]))
            first = max(last + 1 - overlap, first + 1)
        return pieces

    def _encode(self, text: str, is_user: bool = False, is_first: bool = False) -> list[int]:
        """A segment's ids. `is_user`: special tokens in it are mere text. `is_first`: it begins the prompt."""
        return self._encode_batch([text], is_user, is_first)[0]

    def _encode_batch(self, texts: Sequence[str], is_user: bool, is_first: bool = False) -> list[list[int]]:
        if not texts:
            return []
        has_anchor = self._adds_blank and not is_first
        encoding = self.tokenizer(["\n" + text if has_anchor and text else text for text in texts],
                                  add_special_tokens=False, split_special_tokens=is_user,
                                  return_offsets_mapping=has_anchor, truncation=False, padding=False)
        if not has_anchor:
            return encoding.input_ids
        return [_behind_anchor(*row) if row[0] else []
                for row in zip(texts, encoding.input_ids, encoding["offset_mapping"], strict=True)]

    def _cut_template(self) -> str:
        """Set the texts around passage and question; return what the template writes behind an answer."""
        if self.kind == "plain":
            self._before_passage, self._before_question, self._cue = "", "\n", "\n" + CUE
            return ""
        messages = self._messages()
        rendered = self._render(messages, cue=True)
        self._before_passage, rest = rendered.split(PASSAGE)
        self._before_question, cue = rest.split(QUESTION)
        self._cue = cue.rstrip(" ") + _lead(cue.rstrip(" ")) + CUE
        answered = [*messages, {"role": "assistant", "content": f"{CUE} {ANSWER}"}]
        return self._render(answered, cue=False).split(ANSWER)[-1]

    def _messages(self) -> list[dict]:
        messages = [{"role": "system", "content": self.instruction}]
        for shown in self.demonstrations:
            messages += [{"role": "user", "content": _ask(shown.context, " " + shown.question)},
                         {"role": "assistant", "content": f"{CUE} {shown.answer}"}]
        return [*messages, {"role": "user", "content": _ask(PASSAGE, QUESTION)}]

    def _render(self, messages: list[dict], cue: bool) -> str:
        """The chat template's text, or ours where the model has none. `cue`: up to the answer's beginning."""
        if not self.tokenizer.chat_template:
            labels = {"system": "{}\n\n", "user": "{}\n", "assistant": "{}\n\n"}
            return "".join(labels[message["role"]].format(message["content"]) for message in messages)
        # A template may ask for today's date by itself, as Llama 3's does if it is given none.
        fixed_date = "{%- macro strftime_now(format) -%}" + self.date + "{%- endmacro %}"
        system, first, *others = messages
        joined = [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *others]
        for variant in (messages, joined):  # some templates refuse a system message (Gemma's), others leave it out
            try:
                rendered = self.tokenizer.apply_chat_template(
                    variant, chat_template=fixed_date + self.tokenizer.get_chat_template(), tokenize=False,
                    add_generation_prompt=cue, date_string=self.date)
                damage = _damage(rendered, messages)
            except Exception as error:  # jinja2's TemplateError, or whatever a template stumbles over
                damage = f"fails ({error})"
            if not damage:
                return rendered
        raise UserError(f"--prompt engineered: the model's chat template {damage}; use --prompt plain")

    def _bos_ids(self) -> list[int]:
        """What the tokenizer puts before a text by itself: BOS, or nothing."""
        alone = self.tokenizer("a", add_special_tokens=False).input_ids
        full = self.tokenizer("a").input_ids
        return next(full[:i] for i in range(len(full)) if full[i : i + len(alone)] == alone)

    def _find_ends(self, turn_end: str) -> None:
        """Set the three kinds of end token. `turn_end`: the text that the template has behind an answer."""
        tokenizer = self.tokenizer
        special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        turn_ends = [id for id, text in special.items() if turn_end.strip().startswith(text)]
        if not turn_ends and tokenizer.eos_token_id is None:
            raise UserError(f"--model {tokenizer.name_or_path}: its tokenizer names no end-of-text token")
        self.end_token_id: int = turn_ends[0] if turn_ends else tokenizer.eos_token_id
        before_newline = {id: text.split("\n")[0].strip() for id, text in enumerate(self.token_texts()) if "\n" in text}
        newlines = {id for id, before in before_newline.items() if not before}
        self.end_token_ids: list[int] = sorted(special.keys() | newlines)
        self.closing_token_ids: list[int] = sorted(before_newline.keys() - newlines - special.keys())


def _damage(rendered: str, messages: list[dict]) -> str:
    """What a chat template did to the texts of `messages`; "" if it wrote each of them once, word for word.

    The turns must stand in their order, the instruction anywhere: Mistral's template puts it into the last user's turn.
    """
    instruction, *turns = [message["content"].strip() for message in messages]  # templates trim
    frame, rest = "", rendered  # frame: all that stands between the turns
    for turn, message in zip(turns, messages[1:], strict=True):
        before, found, rest = rest.partition(turn)
        if not found:
            return f"drops or changes the {message['role']}'s turn {turn[:40]!r}"
        frame += before + "\0"
    frame += rest
    for text in (*turns, PASSAGE, QUESTION, ANSWER):
        if text in frame:
            return f"repeats {text[:40]!r}"
    return "" if frame.count(instruction) == 1 else "drops, changes or repeats the instruction"


def _behind_anchor(text: str, ids: list[int], offsets: list[tuple[int, int]]) -> list[int]:
    num_anchor = sum(end_char <= 1 for _, end_char in offsets)
    assert offsets[num_anchor][0] == 1, f"the tokenizer merges a newline with {text[:9]!r}"
    return ids[num_anchor:]


def _lead(text_before: str) -> str:
    """The blank that begins a text behind `text_before`, so that no segment needs to end in one."""
    return "" if not text_before or text_before.endswith("\n") else " "


def _ask(passage: str, question: str) -> str:
    return f"Passage:\n{passage}\n\nQuestion:{question}"
