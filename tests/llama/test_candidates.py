"""The plain trie and the fast one against the definition: two loops over all strings, each encoded by `answer_ids`."""

from __future__ import annotations

import random
import unicodedata

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qa.data.squad import Answer, Example, Passage
from qa.llama import candidates_fast
from qa.llama.candidates import ROOT, describe_reachability, make_trie
from qa.llama.candidates_fast import make_trie_fast
from qa.llama.encode import encode_passages
from qa.llama.grounding import ground
from qa.llama.prompt import PromptTemplate
from qa.llama.wording import one_line

TEXT = "The tower (1889) is 330 metres tall.\nThe  tower's naïve_x 塔, don't stop... </s> </s> the the."
WORDS = ["tower", "the", "Norman", "1889", "of", "x", "naïve", "²", "e\u0301", "塔", "高い", "ที่", "—", "(", ")", "'s", "...",
         "_", "</s>"]


def make_superword_tokenizer():
    """Tokens that reach over a space ("of the"), which no word encoded alone can show."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["of the tower of the Norman tower"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


def make_chinese_tokenizer():
    """Tokens of several letters, of a space (or a tab) and letters, and of parts of two letters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<eos>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["的塔 塔塔塔 高い塔の塔高 的灯塔 ที่ที่ tower tower—ish"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


def make_fused_tokenizer():
    """Neighbouring characters that it does not know are one <unk>, however many."""
    tokenizer = Tokenizer(models.BPE(vocab={"<unk>": 0, "<eos>": 1, " ": 2, "a": 3, "\n": 4}, merges=[], unk_token="<unk>",
                                     fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)


@pytest.fixture(params=["byte_level", "sentencepiece", "superword", "chinese"])
def template(request):
    if request.param == "chinese":
        return PromptTemplate(make_chinese_tokenizer())
    if request.param == "superword":
        return PromptTemplate(make_superword_tokenizer())
    return PromptTemplate(request.getfixturevalue(f"{request.param}_tokenizer"))


def class_of(character):
    """Of characters that make a run together; None: each is a unit."""
    if character.isspace():
        return "blank"
    if unicodedata.combining(character) or character in "\u0e31\u0e33\u0e35\u200d":
        return "mark"
    if character.isdecimal():
        return "digit"
    has_blanks = unicodedata.east_asian_width(character) != "W" and not "\u0e00" <= character < "\u0e80"
    return "letter" if character.isalnum() and has_blanks else None


def is_edge(text, place, class_of=class_of):
    if place in (0, len(text)):
        return True
    before, after = text[:place], text[place]
    if class_of(after) == "mark":
        return before[-1].isspace()
    while len(before) > 1 and class_of(before[-1]) == "mark" and not before[-2].isspace():
        before = before[:-1]
    return class_of(after) is None or class_of(before[-1]) != class_of(after)


def cuts_no_word(text, span):
    def word_class(character):
        found = class_of(character)
        return "word" if found in ("letter", "digit") or character == "_" else found

    return all(is_edge(text, place, word_class) for place in span)


def by_definition(template, text, max_tokens):
    """{token ids: places} of all strings between two boundaries."""
    edges = [place for place in range(len(text) + 1) if is_edge(text, place)]
    found = {}
    for start in edges:
        for end in edges:
            if start < end and text[start:end].strip() == text[start:end]:
                ids = template.answer_ids(text[start:end])
                if len(ids) <= max_tokens:
                    found.setdefault(tuple(ids[:-1]), []).append((start, end))
    return found


def in_trie(trie):
    return {tuple(trie.prefix(node)): span for node in all_nodes(trie) if (span := trie.span(node)) is not None}


def all_nodes(trie, node=ROOT):
    return [node, *(below for child in trie.children(node).values() for below in all_nodes(trie, child))]


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 12, 200])
def test_the_trie_holds_the_candidates_and_nothing_else(template, max_tokens):
    rng = random.Random(max_tokens)
    texts = [TEXT, "", " \n ", "a", " a ", "(", "..", "1a2", "a\n\nb"]
    for _ in range(8):
        parts = [rng.choice(WORDS) + rng.choice(["", " ", " ", "  ", "\n", "\t", " \r\n "]) for _ in range(rng.randint(1, 12))]
        texts.append("".join(parts))
    for text in texts:
        trie, expected = make_trie_fast(template, text, max_tokens), by_definition(template, text, max_tokens)
        found = in_trie(trie)
        assert found == in_trie(make_trie(template, text, max_tokens))
        assert found.keys() == expected.keys(), text
        for ids, span in found.items():  # the first place that cuts no word, else the first
            assert span == next((place for place in expected[ids] if cuts_no_word(text, place)), expected[ids][0])
            assert one_line(text[slice(*span)]) == template.decode(ids) or "</s>" in text or "²" in text
        nodes = all_nodes(trie)
        assert trie.num_nodes() == len(nodes) == len(set(nodes))
        assert all(trie.children(node) or trie.span(node) for node in nodes[1:])  # no dead ends
        assert all(trie.prefix(node) == [trie.token(step) for step in trie.path(node)] for node in nodes)


def test_words_are_trusted_only_where_they_agree_with_whole_strings(template, monkeypatch):
    one_by_one = []
    monkeypatch.setattr(candidates_fast, "make_trie", lambda *args: one_by_one.append(1) or make_trie(*args))
    make_trie_fast(template, "The top of the tower of the Norman", 20)
    assert bool(one_by_one) == (len(template.tokenizer("of the").input_ids) == 1)


def test_a_token_over_a_space_is_seen_where_the_parts_have_too_many_tokens():
    template = PromptTemplate(make_superword_tokenizer())  # " of the " is one token, " of" and " the" are two each
    assert in_trie(make_trie_fast(template, "of the tower", 3)).keys() == by_definition(template, "of the tower", 3).keys()


@pytest.mark.parametrize("max_tokens", [2, 4, 9])
def test_long_words_are_cut_where_no_candidate_can_reach(template, monkeypatch, max_tokens):
    """A text without spaces (Chinese, a link) is one word, which has too many parts to encode them all."""
    rng = random.Random(max_tokens)
    texts = ["塔,tower-1889/the.x_" * 6 + " end"]
    for _ in range(12):
        gaps = rng.choice([["", "", "", "", " ", "\t"], ["", " \n "]])
        texts.append("".join(rng.choice([*WORDS, "塔塔塔", "的灯塔"]) + rng.choice(gaps) for _ in range(rng.randint(1, 25))))
    monkeypatch.setattr(candidates_fast, "LONG_WORD", 0)
    for text in texts:
        expected = {ids: places[0] for ids, places in in_order(by_definition(template, text, max_tokens), text).items()}
        assert in_trie(make_trie_fast(template, text, max_tokens)) == expected, text


def test_of_a_long_chinese_word_little_more_than_the_candidates_is_encoded(monkeypatch):
    template = PromptTemplate(make_chinese_tokenizer())
    text = "".join(random.Random(3).choices(["塔", "的", "灯", "高い", "の", "，", "tower"], k=400))
    num_encoded = 0
    original = template.encode_within_answer

    def count(texts, begin):
        nonlocal num_encoded
        num_encoded += len(texts)
        return original(texts, begin)

    monkeypatch.setattr(template, "encode_within_answer", count)
    trie = make_trie_fast(template, text, 20)
    assert num_encoded < 2 * len(in_trie(trie))


def test_a_tokenizer_that_makes_one_token_of_many_unknown_characters_reaches_any_length(monkeypatch):
    monkeypatch.setattr(candidates_fast, "LONG_WORD", 0)
    template, text = PromptTemplate(make_fused_tokenizer()), "塔的灯a塔高a" * 3
    expected = {ids: places[0] for ids, places in in_order(by_definition(template, text, 4), text).items()}
    assert in_trie(make_trie_fast(template, text, 4)) == expected


def in_order(found, text):
    return {ids: sorted(places, key=lambda place: (not cuts_no_word(text, place), place)) for ids, places in found.items()}


def test_place_is_that_of_grounding(byte_level_tokenizer):
    text = "A part-art; an art, the\nart of 1 and 11."
    template = PromptTemplate(byte_level_tokenizer)
    for start, end in in_trie(make_trie(template, text, 30)).values():
        if "\n" not in text[start:end]:
            grounded = ground(text[start:end], text)
            assert (grounded.start_char, grounded.end_char) == (start, end)


def test_worked_case(byte_level_tokenizer):
    """Six candidates, three of which begin with " The"."""
    template = PromptTemplate(byte_level_tokenizer)
    found = in_trie(make_trie(template, "The tower.", 30))
    assert found == {tuple(template.answer_ids("The tower."[start:end])[:-1]): (start, end)
                     for start, end in [(0, 3), (0, 9), (0, 10), (4, 9), (4, 10), (9, 10)]}


CHINESE = "白塔镇的灯塔由林·安娜于一八四四年点亮，1982年改为自动。守塔人住了三十年。"
ANSWERS = ["白塔镇", "林·安娜", "一八四四年", "1982年", "三十年"]


def test_answers_in_a_script_without_spaces_are_candidates(template):
    found = in_trie(make_trie_fast(template, CHINESE, 60))
    for answer in ANSWERS:
        start, end = found[tuple(template.answer_ids(answer)[:-1])]
        assert CHINESE[start:end] == answer


@pytest.mark.parametrize("letters", ["灯塔于年在的，。", "とうカタ高い、ー", "กนที่อัยแำ"])
def test_every_run_of_characters_of_a_script_without_spaces_is_reachable(template, letters):
    rng = random.Random(6)
    text = "".join(rng.choices(letters, k=300))
    places = [place for place in range(301) if is_edge(text, place)]
    answers = [text[start:end] for start, end in (sorted(rng.sample(places, 2)) for _ in range(100))]
    examples = [Example(str(number), "What?", (Answer(answer, text.index(answer)),), (answer,), False, True)
                for number, answer in enumerate(answers)]
    prompts, _ = encode_passages(template, [Passage("t", text, examples)], 2000, max_new_tokens=1000)
    assert describe_reachability(template, examples, prompts, 1000)[0].count("100.00%") == 2


def test_reachability_counts_the_answers_that_are_candidates(template):
    context = "Built in 1889s by Eiffel. It is 330 metres tall"

    def example(*texts):
        answers = tuple(Answer(text, context.index(text)) for text in texts)
        return Example("q", "What?", answers, texts, is_impossible=not texts, trainable=True)

    examples = [example("1889", "188"), example("uilt", "Eiffel"), example("metre"), example()]
    prompts, _ = encode_passages(template, [Passage("t", context, examples)], 400, max_new_tokens=30)
    (line,) = describe_reachability(template, examples, prompts, 30)
    assert "the first answer of 33.33%" in line and "any answer of 66.67%" in line
    assert "first answer of 0.00%" in describe_reachability(template, examples, prompts, 1)[0]
    assert describe_reachability(template, [example()] * 4, prompts, 30) == []
