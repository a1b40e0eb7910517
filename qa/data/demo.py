"""The built-in data: a generated encyclopedia of an invented world in SQuAD form, for machines without a hub.

A passage tells of two subjects of one kind, here two bridges, in three sentences:

    The Dalton Bridge and the Clayton Bridge are two of the great bridges of Wilvia. The Clayton Bridge was damaged on
    28 June 1675, while the Dalton Bridge lost a pillar in a storm on 4 October 1750. The Dalton Bridge cost Leslie
    Ellis a fortune and had Robin Mercer as its architect, while the Clayton Bridge was built to a design by ...

    On what date did a storm damage the Dalton Bridge?      4 October 1750

The facts of a sentence have values of one type. One sentence has the same fact of both subjects (the damage), one has
two facts of each (builder and architect), one has a fact of each. So every question has two or four candidates of the
right type, in the sentence that is most like the question: a model that does not see the question can only guess.

The held-out split has other names and other phrasings than the training split: what can be learned is how to
read, not what is true. v2.0 adds unanswerable questions to those of v1.1: about a fact that is not told,
or about a subject that the passage does not know. What passages and questions say is in demo_facts.py.
Used by: squad.py, for the data sets named `demo` and `demo_v2`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from qa.data.demo_facts import KINDS, Fact, Kind

ARTICLES_PER_KIND = {"train": 20, "held_out": 3}
PASSAGES_PER_ARTICLE = 4
ANSWERABLE_PER_PASSAGE = 5
UNANSWERABLE_PER_PASSAGE = (2, 3)  # one or the other, so that a third of the v2.0 questions have no answer

# The splits share no names and no goods. The names are ordinary: tokenizers do not cut them to pieces.
NAMES = {
    "train": {
        "first": "Robin Morgan Taylor Casey Alex Kim Jamie Terry Kelly Leslie Tracy Shannon Dana Drew Jesse "
                 "Kerry Marion Quinn Riley Sidney Avery Blake Devon Glenn Hayden Sandy Charlie Noel Jules "
                 "Rory",
        "last": "Fletcher Dawson Hobbs Barnes Holloway Mercer Vaughn Wilde Abbott Bishop Donovan Foster "
                "Gallagher Hopkins Jennings Keller Larson Norris Osborne Patton Ramsey Sawyer Tucker Vance "
                "Yates Becker Carver Fischer Gibbs Jarvis Kramer Nolan Palmer Reeves Tanner Voss Weaver "
                "Drake Ellis Garner Lambert Maddox Pierce Rhodes Talbot Crane Frost Klein Novak Stokes",
        "place": "Ashford Bedford Bolton Burton Camden Carlisle Clayton Clifton Dalton Denton Dover Easton "
                 "Exeter Fairfield Grafton Hampton Hartford Houghton Kingston Langley Mansfield Milton "
                 "Morton Newport Norton Oldham Preston Shelton Stafford Stanton Stratford Sutton Taunton "
                 "Trenton Wakefield Walton Warrington Weston Windsor Woodstock",
        "land": "Al Bel Cal Cor Dor El Fen Gal Har Jor Kal Lor Mar Nal Or Per Sar Tor Ul Val Wil Zel",
    },
    "held_out": {
        "first": "Sam Pat Lee Ashley Logan Parker Cameron Francis Jean Max Rowan Adrian",
        "last": "Chandler Everett Irving Sinclair Underwood Walters Zimmerman Emerson Hendricks Lowell "
                "Monroe Sheridan Bauer Conway Forbes Hoffman Schultz Brandt Graves Marsh",
        "place": "Barton Beverley Bradford Chester Darlington Durham Fulton Greenwich Hastings Lancaster "
                 "Middleton Princeton Richmond Salem Stockton Upton Wellington Winchester",
        "land": "An Bor Dun Gil Kor Mel Os Rad Tam Wes",
    },
}
LAND_ENDS = "nia via land mark stan gard".split()
GOODS = {
    "train": ("copper wire|goat cheese|woollen cloth|glass beads|salted fish|pine tar|bone combs|"
              "silver thread|barley beer|cane sugar|iron nails|clay pipes|lamp oil|raw silk|dried figs|"
              "olive soap|felt hats|church bells|brass buttons|paper lanterns|oak barrels|wild honey|"
              "tanned leather|roof tiles").split("|"),
    "held_out": ("pocket watches|cherry brandy|sheep skins|window panes|candle wax|steel pens|walnut tables|"
                 "linen sails|smoked eels|tin plates|black pepper|garden tools").split("|"),
}
MONTHS = "January February March April May June July August September October November December".split()

Values = dict[tuple[str, Fact], str]  # (subject, fact) -> the value, written as in the passage


def demo_squad(split: str, v2: bool = False, seed: int = 0) -> dict:
    """Generate one split as official SQuAD JSON.

    Args:
        split: "train" or "held_out".
        v2: add unanswerable questions, and `is_impossible` to all.
        seed: another seed is another encyclopedia; the same seed gives the same bytes everywhere.
    """
    assert split in NAMES, split
    # Seeded with a string, `Random` takes its SHA-512: the same in every process, unlike hash().
    words = Words(split, random.Random(f"encyclopedia {split} {seed}"))
    # A stream of its own, so that v2.0's extra questions leave the draws of v1.1 as they are.
    doubts = Words(split, random.Random(f"unanswerable {split} {seed}"))
    lands = [start + end for start in NAMES[split]["land"].split() for end in LAND_ENDS]
    kinds = KINDS * ARTICLES_PER_KIND[split]
    data = []
    for kind, land in zip(kinds, words.rng.sample(lands, len(kinds)), strict=True):
        paragraphs = write_article(words, doubts, kind, land, v2)
        data.append({"title": kind.title.format(land=land), "paragraphs": paragraphs})
    for article_number, article in enumerate(data):
        for passage_number, paragraph in enumerate(article["paragraphs"]):
            for question_number, qa in enumerate(paragraph["qas"]):  # an id says where the question stands
                qa["id"] = f"demo-{split}-{seed}-{article_number:03d}-{passage_number}-{question_number}"
    return {"version": "v2.0" if v2 else "1.1", "data": data}


@dataclass(frozen=True, slots=True)
class Words:
    """What one split can say, and the random numbers that choose from it."""

    split: str
    rng: random.Random

    def pick(self, alternatives: str) -> str:
        return self.rng.choice(alternatives.split("|"))

    def shuffled(self, items: Iterable) -> list:
        items = list(items)
        return self.rng.sample(items, len(items))

    def phrase(self, source: Fact | Kind, what: str) -> str:
        """One of this split's phrasings: `what` is "says" or "asks" of a fact, or "opens" of a kind."""
        return self.pick(getattr(source, f"{self.split}_{what}"))

    def pair(self, type: str, taken: list[str]) -> list[str]:
        """Two new values, the earlier first; neither is a part of the other or of anything in `taken`."""
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
        patterns = {"person": "{first} {last}", "city": "{place}"}.get(type, type)
        fields = {field: rng.sample(names.split(), 2) for field, names in NAMES[self.split].items()}
        return [self.pick(patterns).format(**{field: fields[field][i] for field in fields}) for i in range(2)]


def write_article(words: Words, doubts: Words, kind: Kind, land: str, v2: bool) -> list[dict]:
    """The paragraphs of an article, each about two subjects of its own."""
    paragraphs, subjects_so_far = [], [land]
    for _ in range(PASSAGES_PER_ARTICLE):
        subjects = words.pair(kind.subject, subjects_so_far)
        subjects_so_far += subjects
        values = draw_values(words, kind, subjects, subjects_so_far)
        plan = choose_facts(words, kind, subjects)
        context = write_passage(words, kind, land, plan, values)
        told = [(subject, fact) for sentence in plan for subject, facts in sentence.items() for fact in facts]
        qas = answerable(words, told, values, context)
        if v2:
            stranger = doubts.pair(kind.subject, [context, *subjects])[0]
            untold = [pair for pair in values if pair not in told] + [(stranger, doubts.rng.choice(kind.facts))]
            qas = [qa | {"is_impossible": False} for qa in qas] + unanswerable(doubts, untold)
        paragraphs.append({"context": context, "qas": qas})
    return paragraphs


def pairs_of_facts(kind: Kind) -> list[tuple[Fact, Fact]]:
    """The facts, two by two of one type, as demo_facts.py lists them."""
    return list(zip(kind.facts[::2], kind.facts[1::2], strict=True))


def draw_values(words: Words, kind: Kind, subjects: list[str], taken: list[str]) -> Values:
    """The value of every fact of both subjects, told or not; none is a part of another or of `taken`."""
    values: Values = {}
    for subject in subjects:
        for first, second in pairs_of_facts(kind):
            two = words.pair(first.type, [*taken, *values.values()])
            values |= zip([(subject, first), (subject, second)], two, strict=True)
    return values


def choose_facts(words: Words, kind: Kind, subjects: list[str]) -> list[dict[str, list[Fact]]]:
    """What each sentence tells of each subject: two facts, one and the same, or one each.

    So a question is settled by its subject and its fact together, by its subject alone, or by either.
    """
    a, b = subjects
    two, (same, _), (one, other) = words.shuffled(words.shuffled(pair) for pair in pairs_of_facts(kind))
    return words.shuffled([{a: two, b: two[::-1]}, {a: [same], b: [same]}, {a: [one], b: [other]}])


def write_passage(words: Words, kind: Kind, land: str, plan: list[dict[str, list[Fact]]], values: Values) -> str:
    """An opening sentence, then one for each type of fact, about both subjects in either order."""
    a, b = plan[0]

    def clause(subject: str, facts: list[Fact]) -> str:
        predicates = [words.phrase(fact, "says").format(x=values[subject, fact]) for fact in facts]
        return f"{subject} {' and '.join(predicates)}"

    sentences = [words.phrase(kind, "opens").format(a=a, b=b, land=land)]
    for told in plan:
        sentences.append(", while ".join(clause(*item) for item in words.shuffled(told.items())))
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def answerable(words: Words, told: list[tuple[str, Fact]], values: Values, context: str) -> list[dict]:
    """Questions about what the passage tells."""
    qas = []
    for subject, fact in words.rng.sample(told, ANSWERABLE_PER_PASSAGE):
        text = values[subject, fact]
        assert context.count(text) == 1, (text, context)
        question = words.phrase(fact, "asks").format(s=subject)
        qas.append({"question": question, "answers": [{"text": text, "answer_start": context.index(text)}]})
    return qas


def unanswerable(words: Words, untold: list[tuple[str, Fact]]) -> list[dict]:
    """Questions about what it does not tell."""
    return [{"question": words.phrase(fact, "asks").format(s=subject), "answers": [], "is_impossible": True}
            for subject, fact in words.rng.sample(untold, words.rng.choice(UNANSWERABLE_PER_PASSAGE))]
