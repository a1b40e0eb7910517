"""The program that wrote the built-in data, qa/data/demo_*.json: an encyclopedia of an invented world, in SQuAD form.

A passage is about two subjects of one kind, here two bridges. After an opening sentence, three sentences give facts:

    The Dalton Bridge and the Clayton Bridge are two of the great bridges of Wilvia. The Clayton Bridge was damaged on
    28 June 1675, while the Dalton Bridge lost a pillar in a storm on 4 October 1750. The Dalton Bridge cost Leslie
    Ellis a fortune and had Robin Mercer as its architect, while the Clayton Bridge was built to a design by ...

    On what date did a storm damage the Dalton Bridge?      4 October 1750

The facts of a sentence have values of one type. One sentence gives the same fact of both subjects (the damage), one gives
two facts of each (builder and architect), and one gives a different fact of each. So every question has two or four
candidates of the right type in one sentence. A model that does not see the question can only guess.

The held-out split has other names and other phrasings than the training split: a model can learn how to read, but no
answers. v2.0 adds unanswerable questions to those of v1.1: they ask for a fact that the passage does not give, or about
a subject that it does not know.

Input: encyclopedia.toml, which holds all names and phrasings. The project ships what comes out, and test_demo.py checks that it
still does. To write the files anew:

    python tests/data/encyclopedia.py
"""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ARTICLES_PER_KIND = {"train": 20, "held_out": 3}
PASSAGES_PER_ARTICLE = 4
ANSWERABLE_PER_PASSAGE = 5
UNANSWERABLE_PER_PASSAGE = (2, 3)  # one or the other, so that a third of the v2.0 questions have no answer
MONTHS = "January February March April May June July August September October November December".split()


@dataclass(frozen=True, eq=False, slots=True)
class Fact:
    """A relation of a subject to a value, such as "was designed by". `says` and `asks`: split -> phrasings."""

    type: str  # of the value: year, date, number, person, city or goods
    says: dict[str, list[str]]
    asks: dict[str, list[str]]


@dataclass(frozen=True, eq=False, slots=True)
class Kind:
    """A kind of article, such as "Bridges of {land}"."""

    title: str
    subject: str  # the type of its subjects' names: one of PATTERNS
    opens: dict[str, list[str]]  # split -> phrasings of a passage's first sentence
    facts: list[Fact]  # two of each type, one after the other


_DATA = tomllib.loads(Path(__file__).with_name("encyclopedia.toml").read_text(encoding="utf-8"))
NAMES = {split: {field: names.split() for field, names in fields.items()} for split, fields in _DATA["names"].items()}
GOODS, PATTERNS = _DATA["goods"], _DATA["patterns"]
KINDS = [Kind(**kind | {"facts": [Fact(**fact) for fact in kind["facts"]]}) for kind in _DATA["kinds"]]

Values = dict[tuple[str, Fact], str]  # (subject, fact) -> the value, written as in the passage


def encyclopedia(split: str, v2: bool = False, seed: int = 0) -> dict:
    """Generate one split as official SQuAD JSON.

    Args:
        split: "train" or "held_out".
        v2: add unanswerable questions, and `is_impossible` to all.
        seed: another seed is another encyclopedia; the same seed gives the same bytes everywhere.
    """
    assert split in NAMES, split
    # Seeded with a string, `Random` takes its SHA-512: the same in every process, unlike hash().
    words = Words(split, random.Random(f"encyclopedia {split} {seed}"))
    # Other random numbers for the extra questions of v2.0, so that v1.1's questions are the same in both.
    doubts = Words(split, random.Random(f"unanswerable {split} {seed}"))
    lands = [start + end for start in NAMES[split]["land"] for end in _DATA["land_ends"]]
    kinds = KINDS * ARTICLES_PER_KIND[split]
    data = []
    for kind, land in zip(kinds, words.rng.sample(lands, len(kinds)), strict=True):
        paragraphs = write_article(words, doubts, kind, land, v2)
        data.append({"title": kind.title.format(land=land), "paragraphs": paragraphs})
    for article_number, article in enumerate(data):
        for passage_number, paragraph in enumerate(article["paragraphs"]):
            for question_number, qa in enumerate(paragraph["qas"]):  # an id says where the question is
                qa["id"] = f"demo-{split}-{seed}-{article_number:03d}-{passage_number}-{question_number}"
    return {"version": "v2.0" if v2 else "1.1", "data": data}


@dataclass(frozen=True, slots=True)
class Words:
    """The words of one split, and the random numbers that choose from them."""

    split: str
    rng: random.Random

    def shuffled(self, items: Iterable) -> list:
        items = list(items)
        return self.rng.sample(items, len(items))

    def phrase(self, phrasings: dict[str, list[str]]) -> str:
        """One of this split's phrasings."""
        return self.rng.choice(phrasings[self.split])

    def pair(self, type: str, taken: list[str]) -> list[str]:
        """Two new values, of times the earlier first. Neither is a part of the other, or of anything in `taken`."""
        while True:
            two = self._pair(type)
            if not any(one in other or other in one for one, other in [two, *product(two, taken)]):
                return two

    def _pair(self, type: str) -> list[str]:
        rng = self.rng
        year = rng.randrange(1600, 1920)
        years = [year, year + rng.randrange(20, 60)]
        if type == "year":
            return [str(year) for year in years]
        if type == "date":
            return [f"{rng.randrange(1, 29)} {rng.choice(MONTHS)} {year}" for year in years]
        if type == "number":
            return [str(number) for number in rng.sample(range(100, 1000), 2)]
        if type == "goods":
            return rng.sample(GOODS[self.split], 2)
        fields = {field: rng.sample(names, 2) for field, names in NAMES[self.split].items()}
        return [rng.choice(PATTERNS[type]).format(**{field: fields[field][i] for field in fields}) for i in range(2)]


def write_article(words: Words, doubts: Words, kind: Kind, land: str, v2: bool) -> list[dict]:
    """The paragraphs of an article. Each is about two other subjects."""
    paragraphs, subjects_so_far = [], [land]
    for _ in range(PASSAGES_PER_ARTICLE):
        subjects = words.pair(kind.subject, subjects_so_far)
        subjects_so_far += subjects
        values = draw_values(words, kind, subjects, subjects_so_far)
        plan = choose_facts(words, kind, subjects)
        context = write_passage(words, kind, land, plan, values)
        given = [(subject, fact) for sentence in plan for subject, facts in sentence.items() for fact in facts]
        qas = answerable(words, given, values, context)
        if v2:
            stranger = doubts.pair(kind.subject, [context, *subjects])[0]
            not_given = [pair for pair in values if pair not in given] + [(stranger, doubts.rng.choice(kind.facts))]
            qas = [qa | {"is_impossible": False} for qa in qas] + unanswerable(doubts, not_given)
        paragraphs.append({"context": context, "qas": qas})
    return paragraphs


def pairs_of_facts(kind: Kind) -> list[tuple[Fact, Fact]]:
    """The facts, two by two: both of a pair have the same type."""
    return list(zip(kind.facts[::2], kind.facts[1::2], strict=True))


def draw_values(words: Words, kind: Kind, subjects: list[str], taken: list[str]) -> Values:
    """A value for every fact of both subjects, used or not. No value is a part of another one, or of anything in `taken`."""
    values: Values = {}
    for subject in subjects:
        for first, second in pairs_of_facts(kind):
            two = words.pair(first.type, [*taken, *values.values()])
            values |= zip([(subject, first), (subject, second)], two, strict=True)
    return values


def choose_facts(words: Words, kind: Kind, subjects: list[str]) -> list[dict[str, list[Fact]]]:
    """The facts of each sentence, for each subject: two facts of both, the same fact of both, or a different fact of each.

    So to find an answer a model needs the subject and the fact of the question, or the subject alone, or either of them.
    """
    a, b = subjects
    two, (same, _), (one, other) = words.shuffled(words.shuffled(pair) for pair in pairs_of_facts(kind))
    return words.shuffled([{a: two, b: two[::-1]}, {a: [same], b: [same]}, {a: [one], b: [other]}])


def write_passage(words: Words, kind: Kind, land: str, plan: list[dict[str, list[Fact]]], values: Values) -> str:
    """An opening sentence, then one sentence for each part of the plan. The order of the two subjects is random."""
    a, b = plan[0]

    def clause(subject: str, facts: list[Fact]) -> str:
        predicates = [words.phrase(fact.says).format(x=values[subject, fact]) for fact in facts]
        return f"{subject} {' and '.join(predicates)}"

    sentences = [words.phrase(kind.opens).format(a=a, b=b, land=land)]
    for given in plan:
        sentences.append(", while ".join(clause(*item) for item in words.shuffled(given.items())))
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def answerable(words: Words, given: list[tuple[str, Fact]], values: Values, context: str) -> list[dict]:
    """Questions about facts that the passage gives."""
    qas = []
    for subject, fact in words.rng.sample(given, ANSWERABLE_PER_PASSAGE):
        text = values[subject, fact]
        assert context.count(text) == 1, (text, context)
        question = words.phrase(fact.asks).format(s=subject)
        qas.append({"question": question, "answers": [{"text": text, "answer_start": context.index(text)}]})
    return qas


def unanswerable(words: Words, not_given: list[tuple[str, Fact]]) -> list[dict]:
    """Questions about facts that it does not give."""
    return [{"question": words.phrase(fact.asks).format(s=subject), "answers": [], "is_impossible": True}
            for subject, fact in words.rng.sample(not_given, words.rng.choice(UNANSWERABLE_PER_PASSAGE))]


def as_text(document: dict) -> str:
    """Its JSON, a paragraph with its questions a line."""
    articles = []
    for article in document["data"]:
        paragraphs = ",\n".join(json.dumps(paragraph) for paragraph in article["paragraphs"])
        articles.append(f'{{"title": {json.dumps(article["title"])}, "paragraphs": [\n{paragraphs}]}}')
    return f'{{"version": {json.dumps(document["version"])}, "data": [\n' + ",\n".join(articles) + "]}\n"


if __name__ == "__main__":
    for split in NAMES:
        path = Path(__file__).parents[2] / f"qa/data/demo_{split}.json"
        path.write_text(as_text(encyclopedia(split, v2=True)), encoding="utf-8")
