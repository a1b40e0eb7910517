"""Where a span of a passage may begin and end."""

from qa.llama.units import PARTS, WORDS, Units

TEXT = "It's 1889ish: a_b, x² 2nd."


def test_a_text_cut_by_hand():
    parts, words = Units(TEXT, PARTS), Units(TEXT, WORDS)
    assert strings(parts) == ["It", "'", "s", "1889", "ish", ":", "a", "_", "b", ",", "x²", "2", "nd", "."]
    assert strings(words) == ["It", "'", "s", "1889ish", ":", "a_b", ",", "x²", "2nd", "."]
    assert parts.starts[:5] == [0, 2, 3, 5, 9] and parts.ends[:5] == [2, 3, 4, 9, 12]
    assert parts.string(0, 3) == "It's 1889"
    assert parts.chunks == [(0, 3), (3, 6), (6, 10), (10, 11), (11, 14)]
    assert words.chunk_stop == [3, 3, 3, 5, 5, 7, 7, 8, 10, 10]


def strings(units):
    return [units.string(unit, unit) for unit in range(len(units.starts))]


def test_a_text_without_units_has_no_chunks():
    assert Units(" \n", PARTS).chunks == Units("", WORDS).chunk_stop == []
