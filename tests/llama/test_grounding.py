"""Grounding against brute force over every span of a passage."""

import random
import re
from collections import Counter

import pytest

from qa.evaluation.metrics import normalize_answer
from qa.llama import grounding
from qa.llama.edits import edit_table, edits_to_beginnings
from qa.llama.grounding import Grounded, Words, best_f1_spans, ground, plain_best_f1_spans

WORDS = ["a", "an", "the", "The", "cat", "Cat", "sat", "on", "mat", "U.S", "t.he", "x–a–y", "x–t.h", "1,000",
         "(", ")", "—", ",", "energy-storage", "can't", "Ärger", "—the", "cat.", "a.n.", "中，文", "_the_",
         "mat;mat", "th.e-cat", "'_'", "cafe\u0301", "中文中a文"]


UNIT = r"(?:(?![中文])\w)(?:(?![中文])\w|\u0301)*|[^\s]\u0301*"  # "中", "文" are of a script without blanks


def levenshtein(a: str, b: str) -> int:
    """The full table, by the textbook."""
    table = [[i + j if i == 0 or j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            replaced = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, replaced)
    return table[-1][-1]


def brute_force(text: str, context: str) -> tuple:
    """(start, end, kind) by the definition: every span is normalised, scored and compared in full."""
    text = text.strip()
    pieces = [match.span() for match in re.finditer(UNIT, context)]
    if not text or not pieces:
        return None, None, "empty"
    places = [i for i in range(len(context)) if context.startswith(text, i)]
    starts, ends = {start for start, _ in pieces}, {end for _, end in pieces}
    cuts = [i not in starts or i + len(text) not in ends for i in places]
    if places:
        start = min(zip(cuts, places, strict=True))[1]
        return start, start + len(text), "exact"

    target = normalize_answer(text).split()
    spans = [(start, end) for i, (start, _) in enumerate(pieces) for _, end in pieces[i:]]
    equal, scored = [], []
    for start, end in spans:
        tokens = normalize_answer(context[start:end]).split()
        common = sum((Counter(tokens) & Counter(target)).values())
        if not common:
            continue
        if tokens == target:
            equal.append((end - start, start, end))
        scored.append((-2 * common / (len(tokens) + len(target)), start, end))
    if equal:
        return *min(equal)[1:], "normalised"
    best = min(scored, default=(0,))[0]
    nearest = [span for f1, *span in scored if f1 == best] or spans
    return *min(nearest, key=lambda span: (levenshtein(text, context[span[0]:span[1]]), span)), "repaired"


def random_case(rng: random.Random) -> tuple[str, str]:
    gaps = ["", " ", " ", " ", "  "]
    context = "".join(rng.choice(WORDS) + rng.choice(gaps) for _ in range(rng.randint(0, 10)))
    if rng.random() < 0.5 and context.strip():  # a piece of the passage, damaged
        start = rng.randrange(len(context))
        text = list(context[start:start + rng.randint(1, 25)])
        for _ in range(rng.randint(0, 3)):
            text.insert(rng.randint(0, len(text)), rng.choice(" -the.ACz"))
        return "".join(text), context
    return " ".join(rng.choice([*WORDS, "dog", "zzz", "matt"]) for _ in range(rng.randint(0, 5))), context


def test_ground_matches_brute_force_over_all_spans():
    rng = random.Random(1)
    kinds = Counter()
    for _ in range(800):
        text, context = random_case(rng)
        if rng.random() < 0.3:
            text = text.upper()
        found = ground(text, context)
        start, end, kind = brute_force(text, context)
        assert (found.start_char, found.end_char, found.kind) == (start, end, kind), (text, context)
        assert found.text == ("" if kind == "empty" else context[start:end])
        kinds[kind] += 1
    assert min(kinds[kind] for kind in ("exact", "normalised", "repaired", "empty")) >= 5, kinds


def test_few_spans_are_scored_and_the_best_are_the_same():
    rng = random.Random(2)
    num_spans = []
    for _ in range(500):
        text, context = random_case(rng)
        words = Words(context)
        found = best_f1_spans(words, normalize_answer(text).split())
        assert found == plain_best_f1_spans(words, normalize_answer(text).split()), (text, context)
        num_spans.append(len(found))
    assert min(num_spans) == 0 and max(num_spans) > 3


PASSAGE = "In a party, art was shown: the  Denver Broncos (AFC) won an art prize of $5,000 — 24–10, in 2010. 守塔人是林·安娜。"


@pytest.mark.parametrize("text, kind, expected", [
    (" Denver Broncos\n", "exact", "Denver Broncos"),
    ("art", "exact", "art"), ("5,000", "exact", "5,000"), ("part", "exact", "part"),
    ("denver broncos!", "normalised", "Denver Broncos"),
    ("The AFC", "normalised", "AFC"),
    ("5000", "normalised", "5,000"),
    ("The Denver Bronco", "repaired", "the  Denver"),  # F1 2/3, as "Denver", and fewer edits
    ("$5000 prize", "repaired", "prize of $5,000"),
    ("24 to 10", "repaired", "24"),  # "24–10" is one token, another one
    ("the.", "repaired", "the"),  # no token is left of it: by edits
    ("Bronkos", "repaired", "Broncos"),
    ("林安娜", "repaired", "林·安娜"),
    ("塔", "exact", "塔"),
    ("", "empty", ""), (" \n", "empty", ""),
])
def test_cases_worked_by_hand(text, kind, expected):
    found = ground(text, PASSAGE)
    assert (found.kind, found.text) == (kind, expected)
    if kind != "empty":
        assert PASSAGE[found.start_char:found.end_char] == expected
        assert not (text == "art" and found.start_char < 10)  # not the one in "party"


def test_an_article_that_completes_late_is_seen():
    # the first token grows to "x–th", then "the" is an article and "x–" remains
    assert ground("X– do", "x–t.h.e do") == Grounded("x–t.h.e do", 0, 10, "normalised")


def test_a_blank_passage_has_no_span():
    assert ground("cat", " \n") == ground("cat", "") == Grounded("", None, None, "empty")


def test_a_best_span_can_have_the_square_of_the_texts_tokens():
    # c = 2, m = 4 and c = 1, m = 1: F1 2/3 for both, 4 edits against 5
    assert ground("alpha beta", "so alpha x y beta z").text == "alpha x y beta"
    assert ground("alpha beta", "so alpha x y z beta").text == "alpha"


def test_edit_table_finds_the_nearest_then_earliest_start():
    rng = random.Random(8)
    for _ in range(100):
        text, passage = ("".join(rng.choices("abc\U0001F600\ud800", k=rng.randint(1, 7))) for _ in range(2))
        starts = sorted(rng.sample(range(len(passage)), rng.randint(1, len(passage))))
        distance, start = edit_table(text, passage, starts)
        for end in range(starts[0] + 1, len(passage) + 1):
            expected = min((levenshtein(text, passage[s:end]), s) for s in starts if s < end)
            assert (distance[end], start[end]) == expected


def test_edits_to_every_beginning():
    rng = random.Random(9)
    for _ in range(200):
        text, passage = ("".join(rng.choices("abc\U0001F600\ud800", k=rng.randint(least, 9))) for least in (1, 0))
        assert edits_to_beginnings(text, passage) == [levenshtein(text, passage[:end]) for end in range(len(passage) + 1)]


@pytest.mark.parametrize("alphabet", ["().,'-b", "()—,a b", "the—.’ab", "ΑΣ’.–", "中文b。., "])
def test_ground_matches_brute_force_in_runs_without_blanks(alphabet):
    rng = random.Random(alphabet)
    for _ in range(120):
        context, word = ("".join(rng.choices(alphabet, k=rng.randint(1, most))) for most in (18, 9))
        for text in (word, word + " " + word[::-1]):
            found = ground(text, context)
            assert (found.start_char, found.end_char, found.kind) == brute_force(text, context), (text, context)


@pytest.mark.parametrize("passage", [
    "().,;:-/" * 500, "(" * 2000 + "cat" + ")" * 2000, "。，" * 2000, "中文日本" * 1000, "cat-" * 1000, "—a—the" * 500,
    "—…“”«»" * 700,
    "the school of art in a town, of 1,200 people " * 400 + "，".join(["日本", "中文", "東京"] * 100),
])  # fmt: skip
@pytest.mark.parametrize("text", ["the cats", "中文，東日本", "zebra " * 40, "the of in a", "— — —", "—" * 30])
def test_a_long_passage_is_normalised_in_few_parts(monkeypatch, passage, text):
    num_chars = []
    monkeypatch.setattr(grounding, "normalize_answer", lambda part: num_chars.append(len(part)) or normalize_answer(part))
    grounding._tokens.cache_clear()
    grounding._words.cache_clear()
    ground(text, passage)
    assert len(num_chars) < 10 * len(passage) and sum(num_chars) < 500 * len(passage)
