"""Prompts: what the ids of the parts say when they are put together, and where an answer ends."""

from __future__ import annotations

import json
import random
from datetime import datetime

import pytest

from qa.data.squad import Answer, Example, Passage
from qa.errors import UserError
from qa.llama.chat import DATE, Frame, chat_frame
from qa.llama.demonstrations import Demonstration, choose_demonstrations
from qa.llama.encode import encode_passages, split_passage
from qa.llama.prompt import PromptTemplate
from qa.llama.wording import INSTRUCTION, REFUSAL

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (  # no newline before the answer; no system role
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (  # prints a date
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ 'Today: ' + date_string + ' ' + strftime_now('%Y') + '\n' }}" + CHATML
)
SILENT = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")  # drops the system's
CONTEXT = "The tower was built in 1889 by\tGustave Eiffel.\nIt is 330 metres tall — naïve </s> <|im_end|> 塔 🗼. "
QUESTION = " Who built the tower? "


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request):
    return request.getfixturevalue(f"{request.param}_tokenizer")


def whole_prompt(template, context=CONTEXT, question=QUESTION, answer="Gustave Eiffel"):
    return (template.instruction_ids + template.passage_ids(context) + template.question_ids(question)
            + template.answer_ids(answer))  # fmt: skip


def as_text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def without_sentencepiece_spaces(text):
    """SentencePiece prints a space after a special token, whoever encodes the text: the model's own way."""
    return text.replace("<s> ", "<s>").replace("</s> ", "</s>")


def test_frame_of_a_chat_template_in_literal_text(byte_level_tokenizer):
    byte_level_tokenizer.chat_template = CHATML
    frame = chat_frame(byte_level_tokenizer, "Copy a phrase.", [Demonstration("Rome.", "What?", "Rome")], DATE)
    assert frame == Frame(
        before_passage="<|im_start|>system\nCopy a phrase.<|im_end|>\n<|im_start|>user\nPassage:\nRome.\n\nQuestion: What?"
        "<|im_end|>\n<|im_start|>assistant\nAnswer: Rome<|im_end|>\n<|im_start|>user\nPassage:\n",
        before_question="\n\nQuestion:", cue="<|im_end|>\n<|im_start|>assistant\nAnswer:", after_answer="<|im_end|>\n")


def test_plain_prompt_is_passage_question_answer_and_nothing_else(tokenizer):
    template = PromptTemplate(tokenizer, "plain")
    bos = tokenizer.bos_token if template.instruction_ids else ""
    expected = f"{bos}{CONTEXT}\nWho built the tower?\nAnswer: Gustave Eiffel{tokenizer.eos_token}"
    text = as_text(tokenizer, whole_prompt(template))
    assert without_sentencepiece_spaces(text) == without_sentencepiece_spaces(expected)


@pytest.mark.parametrize("chat_template", [CHATML, LLAMA2, LLAMA3, None])
@pytest.mark.parametrize("is_v2", [False, True])
def test_engineered_prompt_is_the_rendered_chat_template(tokenizer, chat_template, is_v2):
    """The oracle: the template rendered with the real texts. Only the spaces at the seams are ours."""
    tokenizer.chat_template = chat_template
    demonstration = Demonstration("Rome is old.", "Is Rome old?", "old")
    template = PromptTemplate(tokenizer, "engineered", is_v2, [demonstration])
    instruction = INSTRUCTION + f' If the passage does not answer the question, write "{REFUSAL}".' * is_v2

    def ask(context, question):
        return f"Passage:\n{context}\n\nQuestion: {question.strip()}"

    user1, user2 = ask(demonstration.passage, demonstration.question), ask(CONTEXT, QUESTION)
    if chat_template is None:
        bos = "<s>" if tokenizer.bos_token == "<s>" else ""
        expected = f"{bos}{instruction}\n\n{user1}\nAnswer: old\n\n{user2}\nAnswer: Gustave Eiffel{tokenizer.eos_token}"
    else:
        if chat_template == LLAMA2:
            user1 = f"{instruction}\n\n{user1}"
        messages = [
            {"role": "system", "content": instruction},
            {"role": "user", "content": user1},
            {"role": "assistant", "content": "Answer: old"},
            {"role": "user", "content": user2},
            {"role": "assistant", "content": "Answer: Gustave Eiffel"},
        ][chat_template == LLAMA2 :]
        today = datetime.now().strftime("%Y")
        expected = tokenizer.apply_chat_template(messages, tokenize=False, date_string=DATE)
        expected = expected.replace(f"{DATE} {today}\n", f"{DATE} {DATE}\n")
        end = "<|im_end|>" if "<|im_end|>" in tokenizer.all_special_tokens else "</s>"
        if chat_template == LLAMA2:
            end = tokenizer.eos_token
        expected = expected[: expected.rindex("Gustave Eiffel")] + "Gustave Eiffel" + end
    text = as_text(tokenizer, whole_prompt(template))
    assert without_sentencepiece_spaces(text) == without_sentencepiece_spaces(expected)
    if chat_template == LLAMA3:
        assert f"Today: {DATE} {DATE}\n" in text


def test_sentencepiece_segments_are_those_of_the_whole_text(sentencepiece_tokenizer):
    """No "▁" at a seam: the ids are what the tokenizer makes of the whole prompt in one piece."""
    template = PromptTemplate(sentencepiece_tokenizer, "plain")
    context, question = "The tower was built.", "Who built it?"
    ids = whole_prompt(template, context, question, "Gustave")[:-1]
    assert ids == sentencepiece_tokenizer(f"{context}\n{question}\nAnswer: Gustave").input_ids


def test_no_part_ends_in_a_space_and_the_answer_brings_its_own(tokenizer):
    for chat_template in (None, CHATML, LLAMA2):
        tokenizer.chat_template = chat_template
        template = PromptTemplate(tokenizer, "engineered")
        assert not as_text(tokenizer, template.instruction_ids).endswith(" ")
        assert not as_text(tokenizer, template.question_ids("Who?")).endswith(" ")
        joint = template.question_ids("Who?") + template.answer_ids("Gustave")[:-1]
        cue = as_text(tokenizer, template.question_ids("Who?"))
        assert as_text(tokenizer, joint) == f"{cue} Gustave"


def test_text_of_the_user_never_becomes_a_special_token(tokenizer):
    template = PromptTemplate(tokenizer, "plain")
    special = set(tokenizer.all_special_ids)
    hostile = "".join(tokenizer.all_special_tokens)
    assert not special & set(template.passage_ids(hostile))
    assert not special & set(template.question_ids(hostile))
    assert not special & set(template.answer_ids(hostile)[:-1])


def test_answer_survives_encoding_and_ends_once(tokenizer):
    template = PromptTemplate(tokenizer, "plain")
    ends = set(template.end_token_ids)
    for answer in ("Gustave Eiffel", " 1889 ", "naïve 塔 🗼", "a\n b", "x", "$3.5 (1889)"):
        ids = template.answer_ids(answer)
        assert [id in ends for id in ids] == [False] * (len(ids) - 1) + [True]
        assert template.decode(ids) == " ".join(answer.split())


def test_end_tokens_are_the_special_ones_and_spaces_up_to_a_newline(tokenizer):
    template = PromptTemplate(tokenizer, "plain")
    special = set(tokenizer.all_special_ids)
    for id in range(len(tokenizer)):
        text = tokenizer.decode([id], skip_special_tokens=False)
        before, newline, _ = text.partition("\n")
        ends = id in special or bool(newline) and not before.strip()
        assert (id in template.end_token_ids) == ends, text
        assert (id in template.closing_token_ids) == (not ends and bool(newline)), text
    assert template.end_token_id == tokenizer.eos_token_id
    assert any("\n" in tokenizer.decode([id]) for id in template.end_token_ids)


def test_token_with_text_and_newline_closes_and_is_cut(byte_level_tokenizer):
    byte_level_tokenizer.add_tokens([".\n", " \n", "\n\n"])
    template = PromptTemplate(byte_level_tokenizer, "plain")
    closing, space, double = (byte_level_tokenizer.convert_tokens_to_ids(t) for t in (".\n", " \n", "\n\n"))
    assert template.closing_token_ids == [closing]
    assert {space, double} <= set(template.end_token_ids)
    assert template.decode(template.answer_ids("Eiffel")[:-1] + [closing]) == "Eiffel."


def test_turn_end_of_the_chat_template_ends_the_answer(byte_level_tokenizer):
    byte_level_tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    byte_level_tokenizer.chat_template = CHATML
    template = PromptTemplate(byte_level_tokenizer, "engineered")
    assert template.end_token_id == byte_level_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert byte_level_tokenizer.eos_token_id in template.end_token_ids


def test_settings_in_json_give_the_same_prompt(tokenizer):
    tokenizer.chat_template = LLAMA3
    template = PromptTemplate(tokenizer, "engineered", True, [Demonstration("Rome.", "What?", "Rome")], date="1 Jan 1970")
    again = PromptTemplate.from_settings(tokenizer, json.loads(json.dumps(template.settings())))
    assert whole_prompt(again) == whole_prompt(template)
    assert again.settings() == template.settings()
    shot = {"context": "Rome.", "question": "What?", "answer": "Rome"}
    assert list(template.settings()["demonstrations"][0].items()) == list(shot.items())  # the keys of saved settings
    assert "Today: 1 Jan 1970" in as_text(tokenizer, again.instruction_ids)


@pytest.mark.parametrize("is_v2", [False, True])
@pytest.mark.parametrize("broken", [SILENT, "{{ messages[0]['content'] if messages[0]['role'] == 'system' else '' }}" + CHATML])
def test_instruction_that_the_template_drops_or_repeats_goes_into_the_users_turn(byte_level_tokenizer, is_v2, broken):
    byte_level_tokenizer.chat_template = broken
    template = PromptTemplate(byte_level_tokenizer, "engineered", is_v2, [Demonstration("Rome.", "What?", "Rome")])
    text = as_text(byte_level_tokenizer, template.instruction_ids)
    assert text.startswith(f"<|im_start|>user\n{template.instruction}\n\nPassage:\nRome.\n\nQuestion: What?<|im_end|>")
    assert text.count(INSTRUCTION) == 1 and text.count(REFUSAL) == is_v2


def chatml(content="m['content']", messages="messages", after=""):
    """CHATML that writes something else of each message, or other messages."""
    return CHATML.replace("m['content']", content).replace("in messages", f"in {messages}") + after


BROKEN = {  # what a template does -> the template, and what the refusal names
    "no content at all": ("{{ messages[0]['role'] }}", "drops or changes .*Passage"),
    "fails": ("{{ raise_exception('never') }}", "fails .never"),
    "several templates, none the default": ({"tool_use": CHATML}, "fails"),
    "first user's turn goes": (chatml(messages="messages if not m['content'].endswith('Is it?')"), "changes .*Rome"),
    "all but the last turn go": (chatml(messages="messages[-1:]"), "changes .*Rome"),
    "assistant's turns go": (chatml(messages="messages if m['role'] != 'assistant'"), "changes .*Answer: old"),
    "user's turns twice": (chatml("m['content'] * (2 if m['role'] == 'user' else 1)"), "repeats .*Rome"),
    "last turn again": (chatml(after="{{ messages[-1]['content'] }}"), "repeats .*Passage"),
    "passage again": (chatml(after="{{ messages[-1]['content'].split('\n')[1] }}"), "repeats .*passage"),
    "lower case": (chatml("m['content'] | lower"), "changes .*Rome"),
    "one line": (chatml("m['content'].split() | join(' ')"), "changes .*Rome"),
    "JSON": (chatml("m['content'] | tojson"), "changes .*Rome"),
    "HTML": (chatml("m['content'] | e"), "changes .*Passage"),
    "two spaces to one": (chatml("m['content'] | replace('  ', ' ')"), "changes .*Passage"),
    "long turns cut": (chatml("m['content'][:80]"), "drops or changes"),
    "instruction in capitals": (chatml("m['content'] | replace('Read', 'READ')"), "instruction"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_template_that_changes_what_is_said_is_refused_by_name(byte_level_tokenizer, what):
    byte_level_tokenizer.chat_template, named = BROKEN[what]
    with pytest.raises(UserError, match=f"(?s)--prompt engineered.*{named}.*use --prompt plain"):
        PromptTemplate(byte_level_tokenizer, "engineered", demonstrations=[Demonstration("Rome is old.", "Is it?", "old")])


def test_refusal_word_that_the_template_changes_is_refused(byte_level_tokenizer):
    byte_level_tokenizer.chat_template = CHATML.replace("m['content']", "m['content'] | replace('unanswerable', '')")
    PromptTemplate(byte_level_tokenizer, "engineered")
    with pytest.raises(UserError, match="instruction"):
        PromptTemplate(byte_level_tokenizer, "engineered", is_v2=True)


def test_template_without_an_assistants_turn_is_refused_for_nothing_says_how_an_answer_ends(byte_level_tokenizer):
    byte_level_tokenizer.chat_template = CHATML.replace("in messages", "in messages if m['role'] != 'assistant'")
    with pytest.raises(UserError, match="assistant's turn"):
        PromptTemplate(byte_level_tokenizer, "engineered")


def test_demonstration_with_a_special_token_is_refused(byte_level_tokenizer):
    """Everything before the passage is encoded as the template's own text: there it would end a turn."""
    byte_level_tokenizer.chat_template = CHATML
    with pytest.raises(UserError, match="--shots.*Is it.*special token"):
        PromptTemplate(byte_level_tokenizer, "engineered", demonstrations=[Demonstration("Rome <|im_end|>", "Is it?", "old")])


def test_equal_answers_and_turns_that_the_template_trims_or_reorders_are_accepted(byte_level_tokenizer):
    shots = [Demonstration("Rome is old.", "Is it?", "old"), Demonstration("Oslo is old.", "Is it?", "old")]
    in_last_turn = (  # Mistral's: what the system says goes into the last user's turn
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.last %}{{ messages[0]['content'] + '\n\n' }}"
        "{% endif %}{{ m['content'] | trim }} [/INST]{% elif m['role'] != 'system' %}{{ m['content'] + eos_token }}{% endif %}"
        "{% endfor %}")
    for chat_template in (CHATML, LLAMA2, LLAMA3, in_last_turn):
        byte_level_tokenizer.chat_template = chat_template
        template = PromptTemplate(byte_level_tokenizer, "engineered", demonstrations=shots)
        text = as_text(byte_level_tokenizer, template.instruction_ids)
        assert text.count(INSTRUCTION) == 1 and text.count("Answer: old") == 2


def test_plain_prompt_has_no_demonstrations(byte_level_tokenizer):
    with pytest.raises(UserError, match="--shots"):
        PromptTemplate(byte_level_tokenizer, "plain", demonstrations=[Demonstration("a", "b", "c")])


# -- encode.py --------------------------------------------------------------------------------------------------------


def make_passage(context, question="Who?", answer=None, number=0):
    """A passage with one question."""
    answers = (Answer(answer, context.index(answer)),) if answer else ()
    example = Example(f"q{number}", question, answers, tuple(a.text for a in answers), not answers, True)
    return Passage("title", context, [example])


@pytest.mark.parametrize("seed", range(5))
def test_pieces_cover_the_passage_and_fit(tokenizer, seed):
    rng = random.Random(seed)
    context = "".join(rng.choice(["the ", "tower", " Norman", "\n", " ", "塔", "🗼", "1889", "é", "."]) for _ in range(150))
    template = PromptTemplate(tokenizer, "plain")
    max_tokens, overlap = rng.randint(12, 40), rng.randint(0, 8)
    pieces = split_passage(template, context, max_tokens, overlap)
    assert len(pieces) > 1
    assert pieces[0].start_char == 0 and pieces[-1].end_char == len(context)
    for piece in pieces:
        assert piece.text == context[piece.start_char : piece.end_char]
        assert piece.ids == template.passage_ids(piece.text) and len(piece.ids) <= max_tokens
    for one, following in zip(pieces, pieces[1:], strict=False):
        assert one.start_char < following.start_char <= one.end_char < following.end_char
    (whole,) = split_passage(template, context, 10_000, 0)
    assert (whole.ids, whole.text, whole.start_char) == (template.passage_ids(context), context, 0)


def test_training_prompt_takes_the_piece_that_shows_the_answer(tokenizer):
    template = PromptTemplate(tokenizer, "plain", is_v2=True)
    context = " ".join(f"word{i}" for i in range(200))
    passages = [make_passage(context, answer=f"word{i}", number=i) for i in range(200)]  # of one text: they share its pieces
    passages.append(make_passage(context, number=200))
    prompts, notes = encode_passages(template, passages, max_length=120, overlap=30)
    assert [prompt.example_index for prompt in prompts] == list(range(201))
    assert len(notes) == 1 and notes[0].startswith("1 of 1 passages")
    for prompt, passage in zip(prompts[:200], passages, strict=False):
        piece, answer = prompt.piece, passage.examples[0].answers[0]
        assert piece.text == context[piece.start_char : piece.end_char] and piece.ids == template.passage_ids(piece.text)
        assert piece.start_char <= answer.start_char and answer.end_char <= piece.end_char
        assert prompt.answer_ids == template.answer_ids(answer.text)
        num_tokens = len(template.instruction_ids) + len(piece.ids) + len(prompt.question_ids) + len(prompt.answer_ids)
        assert num_tokens <= 120
    assert prompts[200].answer_ids == template.answer_ids(REFUSAL)

    decoding, _ = encode_passages(template, passages[:2], max_length=120, overlap=30, max_new_tokens=10)
    assert len({id(prompt.piece) for prompt in decoding}) == len(decoding) // 2 > 1
    assert all(prompt.answer_ids == [] for prompt in decoding)


def test_long_questions_are_cut_and_counted(tokenizer):
    template = PromptTemplate(tokenizer, "plain")
    prompts, notes = encode_passages(template, [make_passage("The tower.", "Who? " * 90, "tower", 7)], max_length=100)
    assert "(e.g. q7)" in notes[0]
    assert len(prompts[0].question_ids) < 60
    with pytest.raises(UserError, match="--max-length 100.*fewer --shots"):
        encode_passages(template, [make_passage("The tower. " * 30, answer="The tower. " * 30)], max_length=100)


def test_demonstrations_are_short_different_and_repeatable():
    passages = [make_passage("x " * (number // 2 + 1), answer="x", number=number) for number in range(40)]
    chosen = choose_demonstrations(passages, 5, seed=3)
    assert chosen == choose_demonstrations(passages, 5, seed=3)
    assert len({demonstration.passage for demonstration in chosen}) == 5
    assert all(len(demonstration.passage) <= 22 for demonstration in chosen)
    with pytest.raises(UserError, match="--shots 11"):
        choose_demonstrations(passages, 11, seed=3)
