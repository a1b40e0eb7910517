"""SQuAD in, examples out: every fault of the data is counted by name, offsets always fit, both sources agree."""

import codecs
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from qa.data.squad import Answer, find_answer, load_squad, parse_hub_rows, parse_squad
from qa.errors import UserError
from qa.evaluation.metrics import score_v1, score_v2

CONTEXT = "Tor Vald built the bridge in 1846. The bridge cost 120 marks, and Tor Vald paid 60 of them."


def qa(question_id="q1", question="When?", answers=(("1846", 29),), **more) -> dict:
    answers = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": question_id, "question": question, "answers": answers, **more}


def parse(*qas: dict, context: str = CONTEXT, version: str = "1.1"):
    paragraphs = [{"context": context, "qas": list(qas)}]
    return parse_squad({"version": version, "data": [{"title": "Bridges", "paragraphs": paragraphs}]}, "file.json")


def with_contexts(data):
    return [(example, passage.text) for passage in data.passages for example in passage.examples]


def assert_offsets_fit(data) -> None:
    for example, context in with_contexts(data):
        for answer in example.answers:
            assert context[answer.start_char:answer.end_char] == answer.text


def test_a_sound_file_has_no_findings():
    data = parse(qa("a"), qa("b", answers=[("120", 51), ("120 marks", 51)]))
    assert not data.is_v2 and data.has_answers and data.summary.problems == {}
    [passage] = data.passages
    first, second = passage.examples
    assert (passage.title, passage.text, first.id, first.question) == ("Bridges", CONTEXT, "a", "When?")
    assert second.answers == (Answer("120", 51), Answer("120 marks", 51)) and second.gold_texts == ("120", "120 marks")
    assert first.trainable and not first.is_impossible
    assert data.describe() == "file.json: SQuAD v1.1, 2 questions on 1 passage, 2 usable for training"


def test_equal_passages_of_an_article_are_one_and_of_two_articles_are_two():
    one, other = {"context": CONTEXT, "qas": [qa("a")]}, {"context": CONTEXT + " ", "qas": [qa("b")]}
    again = {"context": CONTEXT, "qas": [qa("c")]}
    articles = [{"title": "Bridges", "paragraphs": [one, other, again]},
                {"title": "Towers", "paragraphs": [{"context": CONTEXT, "qas": [qa("d")]}]},
                {"title": "Bridges", "paragraphs": [{"context": CONTEXT, "qas": [qa("e")]}]}]
    data = parse_squad({"data": articles}, "file.json")
    assert [(passage.title, passage.text, [example.id for example in passage.examples]) for passage in data.passages] == [
        ("Bridges", CONTEXT, ["a", "c", "e"]), ("Bridges", CONTEXT + " ", ["b"]), ("Towers", CONTEXT, ["d"])]
    assert [example.id for example in data.examples] == ["a", "c", "e", "b", "d"]
    assert "5 questions on 3 passages" in data.describe()


LEFT_OUT = ", left out of training"
FAULTS = {  # what is wrong, as named in the summary -> (version, a question that has it)
    "answer not at its offset, and not at exactly one other place" + LEFT_OUT: ("1.1", qa("x", answers=[("1900", 29)])),
    "answer without the field text" + LEFT_OUT: ("1.1", qa("x") | {"answers": [{"answer_start": 29}]}),
    "empty question" + LEFT_OUT: ("1.1", qa("x", question=" \n")),
    "unanswerable question in v1.1 data" + LEFT_OUT: ("1.1", qa("x", answers=[])),
    "is_impossible contradicts the answers" + LEFT_OUT: ("v2.0", qa("x", is_impossible=True)),
}


@pytest.mark.parametrize("problem", FAULTS)
def test_fault_is_counted_by_name_and_its_question_is_not_trained_on(problem):
    version, faulty = FAULTS[problem]
    sound = [qa("a"), qa("b")] if version == "1.1" else [qa("a", is_impossible=False), qa("b", is_impossible=False)]
    data = parse(sound[0], faulty, sound[1], faulty | {"id": "y"}, version=version)
    assert data.summary.problems == {problem: (2, "x")}  # how many, and the first one's id
    assert [example.trainable for example in data.examples] == [True, False, True, False]  # still there, to be scored
    assert f"  2 × {problem} (e.g. x)" in data.describe().splitlines()


def test_ids_that_restart_in_each_document_are_made_unique():
    """Every question is trained on, predicted and scored: all right is 100."""
    documents = [{"title": title, "paragraphs": [{"context": CONTEXT + title, "qas": [qa(0), qa(1, answers=[answer])]}]}
                 for title, answer in (("Bridges", ("120", 51)), ("Bridge", ("marks", 55)))]
    data = parse_squad({"data": documents}, "file.json")
    assert [example.id for example in data.examples] == ["Bridges/0", "Bridges/1", "Bridge/0", "Bridge/1"]
    assert all(example.trainable for example in data.examples) and data.repeated_ids == {"0", "1"}
    found = "id that several questions have, made unique with the article's title"
    assert data.summary.problems == {found: (4, "Bridges/0")}
    perfect = {example.id: example.answers[0].text for example in data.examples}
    assert score_v1(data.examples, perfect) == {"exact_match": 100, "f1": 100, "total": 4}


def test_a_question_that_stands_twice_is_one_with_the_answers_of_both():
    data = parse(qa("x"), qa("y"), qa("x"), qa("x", answers=[("in 1846", 26), ("1846", 29)]))
    found = "repeated question (same id, passage and text), joined with the first"
    assert data.summary.problems == {found: (2, "x")} and data.repeated_ids == frozenset()
    assert [(example.id, example.gold_texts, example.trainable) for example in data.examples] == [
        ("x", ("1846", "in 1846"), True), ("y", ("1846",), True)]


def test_questions_without_an_id_are_named_by_their_number():
    missing = {"question": "When?", "answers": [{"text": "1846", "answer_start": 29}]}
    data = parse(missing, qa("question-3"), missing | {"id": None}, missing | {"id": " "}, missing | {"id": [["x"]]}, qa(0),
                 qa(1.5))
    ids = [example.id for example in data.examples]
    assert ids == ["question-1", "question-3", "question-3/2", "question-4", "question-5", "0", "1.5"]
    assert data.summary.problems == {"question without an id, named by its number in the file": (4, "question-1")}
    assert all(example.trainable for example in data.examples)


@pytest.mark.parametrize("seed", range(20))
def test_ids_are_unique_whatever_the_files_are(seed):
    """And an id that one question has is left as it is."""
    rng = random.Random(seed)
    pool = [None, "", 0, "0", "1", "T/0", "T/0/2", "T/0/3", "question-2", "question-2/2", *range(10, 20)]
    asked = [qa(rng.choice(pool), question=f"question {number}") for number in range(rng.randint(1, 25))]
    articles = [{"title": rng.choice(["T", "T/0", "U"]), "paragraphs": [{"context": CONTEXT, "qas": [one]}]} for one in asked]
    data = parse_squad({"data": articles}, "file.json")
    ids = {example.question: example.id for example in data.examples}
    counts = Counter(str(one["id"]) for one in asked)
    assert len(ids) == len(set(ids.values())) == len(asked)
    for one in asked:
        is_kept = one["id"] not in (None, "") and counts[str(one["id"])] == 1
        assert (ids[one["question"]] == str(one["id"])) == is_kept
    assert data.repeated_ids.isdisjoint(ids.values())


@pytest.mark.parametrize("context", ["", " \r\n\t"])
def test_empty_passage_is_counted_with_all_its_questions(context):
    data = parse(qa("x", answers=[("1846", 0)]), qa("y", answers=[("1846", 0)]), context=context)
    assert data.summary.problems["empty passage" + LEFT_OUT] == (2, "x")
    assert not any(example.trainable for example in data.examples) and data.passages[0].text == context


@pytest.mark.parametrize("faulty", [{"id": "x"}, "When?", {"id": "x", "question": 5}, {"id": "x", "question": None}, None])
def test_question_without_its_text_is_passed_over_and_counted(faulty):
    data = parse(qa("a"), faulty)
    assert [example.id for example in data.examples] == ["a"]
    assert data.summary.problems == {"question without the field question, skipped": (1, "Bridges")}


@pytest.mark.parametrize("faulty", [{"context": CONTEXT}, {"qas": [qa()]}, {"context": 5, "qas": [qa()]}, [qa()],
                                    {"context": CONTEXT, "qas": {"id": "x"}}])
def test_passage_without_its_fields_is_passed_over_and_counted(faulty):
    document = {"data": [{"title": "Bridges", "paragraphs": [faulty, {"context": CONTEXT, "qas": [qa("a")]}]}]}
    data = parse_squad(document, "file.json")
    assert [example.id for example in data.examples] == ["a"]
    assert data.summary.problems == {"passage without a text context and a list of qas, skipped": (1, "Bridges")}


def test_misplaced_answer_is_moved_to_its_only_occurrence():
    data = parse(qa("a", answers=[("1846", 3)]), qa("b", answers=[("120", None)]), qa("c", answers=[("120", -40)]),
                 qa("d", answers=[("120", "51")]), qa("e", answers=[("120", 10**9)]))
    assert [example.answers[0].start_char for example in data.examples] == [29, 51, 51, 51, 51]
    assert all(example.trainable for example in data.examples)
    assert data.summary.problems == {"answer moved to its only occurrence in the passage": (4, "a")}
    assert_offsets_fit(data)


def test_answer_in_several_places_is_never_guessed():
    data = parse(qa("a", answers=[("Tor Vald", 1)]), qa("b", answers=[("Tor Vald", 66)]))
    assert data.examples[0].answers == () and not data.examples[0].trainable
    assert data.examples[0].gold_texts == ("Tor Vald",)  # the official rules still score it
    assert data.examples[1].answers == (Answer("Tor Vald", 66),)


def test_further_answer_that_is_nowhere_counts_for_scoring_alone():
    data = parse(qa("a", answers=[("1846", 29), ("in the year 1846", 26), ("in 1846", 26)]))
    assert data.examples[0].gold_texts == ("1846", "in the year 1846", "in 1846")
    assert data.examples[0].answers == (Answer("1846", 29), Answer("in 1846", 26)) and data.examples[0].trainable
    fault = "further answer not at its offset, and not at exactly one other place, only scored"
    assert data.summary.problems == {fault: (1, "a")}


def test_label_is_the_first_answer_or_none():
    """A second answer that stands in the passage does not step in for a first one that does not."""
    data = parse(qa("a", answers=[("1900", 29), ("1846", 29)]))
    assert not data.examples[0].trainable


def test_find_answer_agrees_with_a_search_over_all_positions():
    context = "aab ab aab"
    for text in ["a", "aa", "ab", "aab", "b a", "c", "ab a", context]:
        places = [i for i in range(len(context)) if context[i:i + len(text)] == text]
        for claimed in range(-2, 12):
            expected = claimed if claimed in places else places[0] if len(places) == 1 else None
            assert find_answer(context, text, claimed) == expected, (text, claimed)
    assert find_answer("aaa", "aa", 5) is None  # occurrences that overlap are two


def test_context_keeps_every_character_and_offsets_count_code_points(tmp_path):
    context = "  \n\u00a0The “Café”\r\nof 東京 cost 𝟙𝟚 €.\r Done\u2028 \n"
    answers = [("Café", context.index("Café")), ("東京", context.index("東")), ("𝟙𝟚 €", context.index("𝟙")),
               ("Done", context.index("Done"))]
    document = {"data": [{"title": "Ü", "paragraphs": [
        {"context": context, "qas": [qa(f"q{n}", answers=[answer]) for n, answer in enumerate(answers)]}]}]}
    for ensure_ascii in (True, False):
        path = tmp_path / f"{ensure_ascii}.json"
        path.write_bytes(json.dumps(document, ensure_ascii=ensure_ascii, indent=1).replace("\n", "\r\n").encode())
        data = load_squad(str(path))
        assert data.summary.problems == {}
        assert [passage.text for passage in data.passages] == [context]
        assert [example.answers[0] for example in data.examples] == [Answer(*answer) for answer in answers]
        assert_offsets_fit(data)


def test_file_with_a_byte_order_mark_is_read(tmp_path, small_squad):
    path = tmp_path / "bom.json"
    path.write_bytes(codecs.BOM_UTF8 + json.dumps(small_squad).encode())
    assert len(load_squad(str(path)).examples) == 36


@pytest.mark.parametrize("version", ["v2.0", "2.0", "V2.0-dev", "2", "v2", "v2.0.0", "SQuAD v2.0", "squad_v2"])
def test_v2_is_recognised_by_its_version(version):
    data = parse(qa("a", is_impossible=False), qa("b", answers=[], is_impossible=True), version=version)
    assert data.is_v2 and [example.is_impossible for example in data.examples] == [False, True]
    assert all(example.trainable for example in data.examples) and data.summary.problems == {}


def test_v2_is_recognised_by_its_field():
    data = parse(qa("a"), qa("b", answers=[], is_impossible=True), version="")
    assert data.is_v2 and data.examples[1].is_impossible


@pytest.mark.parametrize("version", ["1.1", "", "2023-05-01", "2.5.2023", "2-5-2023", "2 May 2023", "20", "22.1", None, 1, 1.1,
                                     [2], {"2": 0}])
def test_v1_is_not_taken_for_v2(version):
    assert not parse(qa("a"), version=version).is_v2 and not parse(qa("a", is_impossible=None), version=version).is_v2


def test_v2_without_flags_is_unanswerable_where_it_has_no_answer():
    data = parse(qa("a"), qa("b", answers=[]), qa("c", answers=[("", 0)]), version="v2.0")
    assert [example.is_impossible for example in data.examples] == [False, True, True]
    assert all(example.trainable for example in data.examples)


@pytest.mark.parametrize("blank", ["", " "])
def test_no_answer_written_as_an_empty_text_is_no_answer(blank):
    """Unanswerable in v2.0, trained on and scored as such; in v1.1 left out of training, and still a gold."""
    note = "empty answer, taken as no answer"
    data = parse(qa("a", is_impossible=False), qa("b", answers=[(blank, 3)], is_impossible=True), version="")
    assert data.examples[1].is_impossible and data.examples[1].trainable and data.examples[1].gold_texts == ()
    assert score_v2(data.examples, {"a": "1846", "b": ""})["NoAns_exact"] == 100 and data.summary.problems == {note: (1, "b")}
    data = parse(qa("a"), qa("b", answers=[(blank, 3)]))
    assert [example.trainable for example in data.examples] == [True, False] and data.examples[1].gold_texts == (blank,)
    assert data.summary.problems == {note: (1, "b"), "unanswerable question in v1.1 data" + LEFT_OUT: (1, "b")}
    data = parse(qa("a", is_impossible=False), qa("b", answers=[(blank, 3)], is_impossible=False))
    assert data.summary.problems == {note: (1, "b"), "is_impossible contradicts the answers" + LEFT_OUT: (1, "b")}


def test_claimed_place_written_as_text_is_taken_where_the_answer_stands_twice():
    data = parse(qa("a", answers=[("Tor Vald", "66")]), qa("b", answers=[("Tor Vald", 66.0)]))
    assert [example.answers for example in data.examples] == [(Answer("Tor Vald", 66),)] * 2
    assert data.summary.problems == {} and CONTEXT.startswith("Tor Vald", 66)


def test_what_cannot_be_read_is_named_by_its_type_and_left_out_of_training():
    data = parse(qa("a"), qa("s") | {"answers": ["1846"]}, qa("t") | {"answers": "1846"},
                 qa("l", answers=[("1846", {"at": 29})]), qa("n") | {"answers": [{"text": 1846, "answer_start": 29}]})
    assert data.summary.problems == {
        "answer of the type str" + LEFT_OUT: (2, "s"), "answer whose text is of the type int" + LEFT_OUT: (1, "n"),
        "answer_start of the type dict that is no whole number" + LEFT_OUT: (1, "l"),
        "answer moved to its only occurrence in the passage": (1, "l")}
    assert [example.trainable for example in data.examples] == [True, False, False, False, False]
    data = parse(qa("a", is_impossible=False), qa("x", is_impossible=[]), qa("y", is_impossible="maybe"), version="v2.0")
    flag = "is_impossible of the type {} that is neither true nor false" + LEFT_OUT
    assert data.summary.problems == {flag.format("list"): (1, "x"), flag.format("str"): (1, "y")}


@pytest.mark.parametrize("version", ["1.1", "v2.0"])
def test_file_without_answers_can_be_predicted_but_not_trained_on(version):
    questions = [{"id": "a", "question": "When?"}, {"id": "b", "question": "Who?", "answers": []}]
    data = parse(*questions, version=version)
    assert not data.has_answers and len(data.examples) == 2 and data.summary.problems == {}
    assert not any(example.trainable or example.is_impossible or example.gold_texts for example in data.examples)


def test_articles_without_a_title_stay_apart():
    titles = [{}, {"title": ""}, {"title": None}, {"title": "T"}]
    articles = [{"paragraphs": [{"context": CONTEXT, "qas": [qa(str(n))]}], **title} for n, title in enumerate(titles)]
    assert len({passage.title for passage in parse_squad({"data": articles}, "file.json").passages}) == 4


# ---- the hub's rows --------------------------------------------------------------------------------------------------

def hub_dataset(document: dict):
    """A datasets.Dataset in the schema of rajpurkar/squad and rajpurkar/squad_v2."""
    import datasets

    rows = [{"id": question["id"], "title": article["title"], "context": paragraph["context"],
             "question": question["question"],
             "answers": {key: [answer[field] for answer in question["answers"]]
                         for key, field in (("text", "text"), ("answer_start", "answer_start"))}}
            for article in document["data"] for paragraph in article["paragraphs"] for question in paragraph["qas"]]
    features = datasets.Features({
        "id": datasets.Value("string"), "title": datasets.Value("string"), "context": datasets.Value("string"),
        "question": datasets.Value("string"),
        "answers": datasets.Sequence({"text": datasets.Value("string"), "answer_start": datasets.Value("int32")})})
    return datasets.Dataset.from_list(rows, features=features)


@pytest.mark.parametrize("name", ["squad", "squad_v2"])
@pytest.mark.parametrize("split, hub_split", [("train", "train"), ("dev", "validation")])
def test_hub_rows_equal_the_file(name, split, hub_split, small_squad, small_squad_v2, monkeypatch):
    import datasets

    document = small_squad if name == "squad" else small_squad_v2
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or
                        hub_dataset(document))
    data, expected = load_squad(name, split), parse_squad(document, name)
    assert (data.is_v2, data.has_answers, data.summary) == (expected.is_v2, expected.has_answers, expected.summary)
    fields = ("title", "text", "examples")
    assert [[getattr(passage, field) for field in fields] for passage in data.passages] == [
        [getattr(passage, field) for field in fields] for passage in expected.passages]
    assert asked == [((f"rajpurkar/{name}",), {"split": hub_split})]


def test_hub_rows_of_one_passage_come_together_again(small_squad_v2):
    """In whatever order they come."""
    dataset = hub_dataset(small_squad_v2).shuffle(seed=1)
    data = parse_hub_rows(dataset, "squad_v2", is_v2=True)
    assert {example.id for example in data.examples} == set(dataset["id"])
    assert len(data.passages) == len({passage.text for passage in data.passages}) == 12


# ---- what is no SQuAD ------------------------------------------------------------------------------------------------

def assert_one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


@pytest.mark.parametrize("document, found", [
    ([], "a list"), (5, "a int"), ({}, "(none)"), ({"rows": [], "ids": []}, "rows, ids"), ({"data": {}}, "data"),
    ({"data": []}, "no question"), ({"data": [{"paragraphs": []}]}, "no question"), ({"data": ["T"]}, "a str"),
    ({"data": [{"id": "x", "question": "When?", "context": CONTEXT}]}, "id, question, context"),
])
def test_json_of_another_shape_is_refused_in_one_line(document, found, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_squad(str(path))
    assert_one_line(error, str(path), found, "expected")


@pytest.mark.parametrize("content, words", [
    (b"", "empty"), (b" \n", "empty"), (b"id,question\n1,When?", "not JSON"), (b'{"data": [', "not JSON"),
    (b'\xff\xfe\x00"', "not JSON"), (b"\x80abc", "not JSON"),
])
def test_file_that_is_no_json_is_refused_in_one_line(content, words, tmp_path):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_squad(str(path))
    assert_one_line(error, str(path), words, "expected SQuAD JSON")


def test_missing_file_and_folder_are_refused_in_one_line(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(UserError) as error:
            load_squad(str(path))
        assert_one_line(error, str(path), "squad_v2", "demo")


def test_half_a_surrogate_pair_is_replaced_wherever_it_stands():
    """One character by one, so that offsets stay; a whole pair is a character."""
    half = json.loads('"\\ud83d"')
    context = f"{half}The {half} cat 😀"
    document = {"data": [{"title": f"T{half}", "paragraphs": [{"context": context, "qas": [
        qa(f"x{half}", question=f"Who{half}?", answers=[(f"{half} cat 😀", 5), ("cat", 7)]), qa("y", answers=[("cat", 7)])]}]}]}
    data = parse_squad(document, "file.json")
    [passage] = data.passages
    first, second = passage.examples
    assert (passage.title, passage.text) == ("T\ufffd", "\ufffdThe \ufffd cat 😀")
    assert (first.id, first.question) == ("x\ufffd", "Who\ufffd?")
    assert first.answers == (Answer("\ufffd cat 😀", 5), Answer("cat", 7))
    assert first.gold_texts == ("\ufffd cat 😀", "cat") and first.trainable and second.trainable
    assert data.summary.problems == {"text with half a surrogate pair, which was replaced by U+FFFD": (2, "T\ufffd")}
    data.describe().encode()


@pytest.mark.parametrize("paragraph, reason", [
    ({"context": CONTEXT, "qas": qa()}, "1 × passage without a text context and a list of qas, skipped (e.g. Bridges)"),
    ({"context": CONTEXT, "qas": ["When?", {}]}, "2 × question without the field question, skipped (e.g. Bridges)")])
def test_an_error_for_want_of_questions_says_what_was_passed_over(paragraph, reason):
    with pytest.raises(UserError) as error:
        parse_squad({"data": [{"title": "Bridges", "paragraphs": [paragraph]}]}, "file.json")
    assert_one_line(error, "file.json: no question", reason)


@pytest.mark.parametrize("depth", [100, 400, 900, 1000, 100_000])
@pytest.mark.parametrize("where", ['{"version": %s, "data": []}', '{"data": %s}', '{"data": [{"title": %s, "paragraphs": 5}]}',
                                   '{"data": [{"paragraphs": [{"context": "The", "qas": [{"id": %s, "question": %s}]}]}]}'])
def test_brackets_within_brackets_are_one_line_or_read(where, depth, tmp_path):
    path = tmp_path / "deep.json"
    path.write_text(where.replace("%s", "[" * depth + "]" * depth))
    try:
        assert len(load_squad(str(path)).examples) == 0
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 300


def test_no_hub_is_said_with_what_works_without_one(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nMax retries exceeded")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError) as error:
        load_squad("squad")
    assert_one_line(error, "squad", "ConnectionError", "SQuAD JSON file", "demo")


# ---- real SQuAD ------------------------------------------------------------------------------------------------------

@pytest.mark.squad
@pytest.mark.skipif("SQUAD_DIR" not in os.environ, reason="SQUAD_DIR is not set")
def test_real_squad_is_read_whole():
    """Every question of every file is there, and an answer of the file is left out only if it is not in its passage."""
    paths = sorted((Path(os.environ["SQUAD_DIR"]) / "squad").glob("*.json"))
    assert paths
    for path in paths:
        data, document = load_squad(str(path)), json.loads(path.read_bytes())
        questions = [(paragraph["context"], question) for article in document["data"]
                     for paragraph in article["paragraphs"] for question in paragraph["qas"]]
        assert [example.id for example in data.examples] == [question["id"] for _, question in questions]
        assert data.is_v2 == ("v2" in path.name)
        assert_offsets_fit(data)
        for (example, text), (context, question) in zip(with_contexts(data), questions, strict=True):
            assert example.gold_texts == tuple(answer["text"] for answer in question["answers"])
            assert text == context and example.is_impossible == question.get("is_impossible", False)
