r"""A model's chat template, rendered once and cut into the texts that stay the same.

A chat template is a program in the tokenizer. It writes messages (system, user, assistant) as the one text that the model
was trained on. `chat_frame` renders it with sentinels in the places of passage, question and answer, and cuts the text there.
SmolLM2's gives

    before_passage    <|im_start|>system\n{INSTRUCTION}<|im_end|>\n<|im_start|>user\nPassage:\n
    before_question   \n\nQuestion:
    cue               <|im_end|>\n<|im_start|>assistant\nAnswer:
    after_answer      <|im_end|>\n

The cue begins the assistant's turn for the model: small models then answer more briefly. A date is fixed (Llama 3's template
prints today's), and thinking is off (Qwen3's then writes an empty thought before the cue). If a template leaves the
instruction out, the user's turn says it. A template that drops, changes or repeats anything else is refused.

Used by: prompt.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qa.errors import UserError
from qa.llama.demonstrations import Demonstration
from qa.llama.wording import CUE, ask, space_after

DATE = "26 Jul 2024"  # what Llama 3's template prints where it is told no date
# Sentinels: with characters that a template which escapes or normalises its texts would change.
PASSAGE, QUESTION, ANSWER = (f"⟦{name}  \"'<&>⟧" for name in ("passage", "question", "answer"))
AFTER_TURN = {"system": "\n\n", "user": "\n", "assistant": "\n\n"}  # for a model without a chat template


@dataclass(frozen=True)
class Frame:
    """The texts of a prompt around passage, question and answer. The first three do not end in a space."""

    before_passage: str
    before_question: str
    cue: str
    after_answer: str


PLAIN_FRAME = Frame("", "\n", f"\n{CUE}", "")


def chat_frame(tokenizer, instruction: str, demonstrations: Sequence[Demonstration], date: str) -> Frame:
    """The frame that the tokenizer's chat template writes. It depends on the arguments alone."""
    messages = [{"role": "system", "content": instruction}]
    for shown in demonstrations:
        messages += [{"role": "user", "content": ask(shown.passage, shown.question)},
                     {"role": "assistant", "content": f"{CUE} {shown.answer}"}]
    messages.append({"role": "user", "content": ask(PASSAGE, QUESTION)})
    answered = [*messages, {"role": "assistant", "content": f"{CUE} {ANSWER}"}]

    before_passage, rest = _render(tokenizer, messages, date, begin_answer=True).split(PASSAGE)
    before_question, cue = (text.rstrip(" ") for text in rest.split(QUESTION))
    after_answer = _render(tokenizer, answered, date, begin_answer=False).split(ANSWER)[-1]
    return Frame(before_passage, before_question, cue + space_after(cue) + CUE, after_answer)


def _render(tokenizer, messages: list[dict], date: str, begin_answer: bool) -> str:
    """The chat template's text, or ours where the model has none. `begin_answer`: the assistant's turn is begun."""
    if not tokenizer.chat_template:
        return "".join(message["content"] + AFTER_TURN[message["role"]] for message in messages)
    # A template may ask for today's date by itself, as Llama 3's does if it is given none.
    fixed_date = "{%- macro strftime_now(format) -%}" + date + "{%- endmacro %}"
    system, first, *others = messages
    joined = [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *others]
    for variant in (messages, joined):  # some templates refuse a system message (Gemma's), others leave it out
        try:
            rendered = tokenizer.apply_chat_template(variant, chat_template=fixed_date + tokenizer.get_chat_template(),
                                                     tokenize=False, add_generation_prompt=begin_answer, date_string=date,
                                                     enable_thinking=False)
            damage = _damage(rendered, messages)
        except Exception as error:  # jinja2's TemplateError, or whatever a template stumbles over
            damage = f"fails ({error})"
        if not damage:
            return rendered
    raise UserError(f"--prompt engineered: the model's chat template {damage}; use --prompt plain")


def _damage(rendered: str, messages: list[dict]) -> str:
    """What a chat template did to the texts of `messages`; "" if it wrote each of them once, word for word.

    The turns must be in order. The instruction may be anywhere: Mistral's template puts it into the last user's turn.
    """
    instruction, *turns = [message["content"].strip() for message in messages]  # templates trim
    between, rest = "", rendered  # between: all text that is in no turn
    for turn, message in zip(turns, messages[1:], strict=True):
        before, found, rest = rest.partition(turn)
        if not found:
            return f"drops or changes the {message['role']}'s turn {turn[:40]!r}"
        between += before + "\0"
    between += rest
    for text in (*turns, PASSAGE, QUESTION, ANSWER):
        if text in between:
            return f"repeats {text[:40]!r}"
    return "" if between.count(instruction) == 1 else "drops, changes or repeats the instruction"
