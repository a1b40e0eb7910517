"""Where a span of a passage may begin and end."""

import random
import re

import pytest

from qa.llama.units import LARGE_UNITS, SMALL_UNITS, Units, kind

TEXT = "It's 1889ish: a_b, x² 2nd."


def strings(text, pattern=SMALL_UNITS):
    units = Units(text, pattern)
    return [units.string(unit, unit) for unit in range(len(units))]


def test_a_text_cut_by_hand():
    small, large = Units(TEXT, SMALL_UNITS), Units(TEXT, LARGE_UNITS)
    assert strings(TEXT, SMALL_UNITS) == ["It", "'", "s", "1889", "ish", ":", "a", "_", "b", ",", "x²", "2", "nd", "."]
    assert strings(TEXT, LARGE_UNITS) == ["It", "'", "s", "1889ish", ":", "a_b", ",", "x²", "2nd", "."]
    assert small.starts[:5] == [0, 2, 3, 5, 9] and small.ends[:5] == [2, 3, 4, 9, 12]
    assert small.string(0, 3) == "It's 1889"
    assert small.word_starts == [0, 3, 6, 10, 11] and large.word_starts == [0, 3, 5, 7, 8]
    assert large.word_stops == [3, 3, 3, 5, 5, 7, 7, 8, 10, 10]


def test_a_text_without_units_has_no_words():
    assert Units(" \n", SMALL_UNITS).word_starts == Units("", LARGE_UNITS).word_stops == []


@pytest.mark.parametrize("pattern, classes", [(SMALL_UNITS, r"[^\W\d_]+|\d+|[^\w\s]|_"), (LARGE_UNITS, r"\w+|[^\w\s]")])
def test_in_scripts_with_spaces_a_unit_is_a_run_of_pythons_classes(pattern, classes):
    rng = random.Random(4)
    alphabet = "abzÄßñ²½①12٣_.,;-'—“ \u3000\t\nЯΣשع한글\u200b\x1f\ud800₤😀"
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 30)))
        assert strings(text, pattern) == re.findall(classes, text)


@pytest.mark.parametrize("text", [
    "鉄|塔|は|ヱ|ッ|フ|ェ|ル|の|、|人|々|〇|ー|ｶﾞ|ㄅ",
    "กำ|แ|พ|ง|ที่|นี่", "ພ|າ|ສ|າ|ລ|າ|ວ", "ភា|សា|ខ្|មែ|រ", "မြ|န်|မာ", "བོ|ད|་|ཡི|ག",
    "Café|塔|in|1902|年", "Cafe\u0301e\u0301|2\u20e3", "हिन्दी", "क\u094d\u200dष", "می\u200cخواهم", "שָׁלוֹם", "한국어|1", "각",
    "👩🏽\u200d🚀|❤\ufe0f\u200d🔥|👍🏿|🇫🇷|🇩🇪|🇫|!", "(\u0308|a",
    "🏴\U000e0067\U000e0062\U000e007f|x", "1\ufe0f\u20e3|#\ufe0f\u20e3",
])  # fmt: skip
def test_characters_of_scripts_without_spaces_and_signs_with_their_marks_are_units(text):
    assert strings(text.replace("|", "")) == text.split("|")


def test_letters_digits_and_underscores_make_one_word_up_to_a_script_without_spaces():
    assert strings("e\u0301_1a年ab2", LARGE_UNITS) == ["e\u0301_1a", "年", "ab2"]


@pytest.mark.parametrize("pattern", [SMALL_UNITS, LARGE_UNITS])
def test_no_unit_begins_with_a_mark_but_after_a_space(pattern):
    rng = random.Random(5)
    for _ in range(300):
        text = "".join(rng.choices("a1_塔ก\u0301\u0e31\u0e33\u200d\ufe0f🏽😀🇫. ", k=rng.randint(1, 20)))
        units = Units(text, pattern)
        assert "".join(strings(text, pattern)) == text.replace(" ", "")
        for start in units.starts:
            assert kind(text[start]) not in "mj" or text[:start][-1:] in ("", " ")


def test_find_is_the_first_place_between_bounds():
    units = Units("A part-art; an art, 1art", SMALL_UNITS)
    assert (units.find("art"), units.find("an art"), units.find("par"), units.find("tra")) == (7, 12, -1, -1)
    assert Units("part e\u0301", SMALL_UNITS).find("e") == -1
    assert units.are_edges(20, 21) and units.are_edges(21, 24) and not units.are_edges(21, 23) and not units.are_edges(1, 6)
