"""Parts of a data set: whole articles are held out, samples are nested, and all of it is a function of the seed."""

import random

import pytest

from qa.data.splits import first_passages, hold_out_articles, training_split
from qa.data.squad import Answer, Example, Passage, SquadData, Summary, parse_squad
from qa.errors import UserError


def make_passages(num_articles: int, seed: int = 0) -> list[Passage]:
    """Articles of 1 to 4 passages of 1 to 5 questions; two of ten questions cannot be trained on."""
    rng = random.Random(seed)
    passages = []
    for article in range(num_articles):
        for number in range(rng.randint(1, 4)):
            examples = [Example(f"{article}-{number}-{question}", "what?", (Answer("passage", 0),), ("passage",), False,
                                rng.random() < 0.8) for question in range(rng.randint(1, 5))]
            passages.append(Passage(f"title {article}", f"passage {number} of article {article}", examples))
    return passages


def make_data(passages: list[Passage], is_v2: bool = False, has_answers: bool = True) -> SquadData:
    return SquadData("file.json", passages, is_v2, has_answers, Summary())


def titles(passages: list[Passage]) -> set[str]:
    return {passage.title for passage in passages}


def questions(passages: list[Passage]) -> list[Example]:
    return [example for passage in passages for example in passage.examples]


@pytest.mark.parametrize("share", [0.02, 0.05, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("num_articles", [2, 7, 40])
def test_held_out_articles_are_whole_and_no_more_than_needed(num_articles, share):
    passages = make_passages(num_articles)
    training, held_out = hold_out_articles(passages, share, seed=3)
    assert training and held_out and not titles(training) & titles(held_out)
    assert sorted(training + held_out, key=passages.index) == passages  # a partition
    for part in (training, held_out):  # each in the file's order
        assert part == [passage for passage in passages if passage.title in titles(part)]
    # Enough, unless one article only is left to train on; and not without the last article drawn.
    num_questions, num_held = len(questions(passages)), len(questions(held_out))
    assert num_held >= share * num_questions or len(titles(training)) == 1
    largest = max(len(questions([p for p in held_out if p.title == title])) for title in titles(held_out))
    assert num_held - largest < share * num_questions


def test_split_is_a_function_of_the_seed_and_not_of_the_files_order():
    passages = make_passages(30)
    _, held_out = hold_out_articles(passages, 0.2, seed=1)
    assert titles(hold_out_articles(passages[::-1], 0.2, seed=1)[1]) == titles(held_out)
    assert titles(hold_out_articles(passages, 0.2, seed=2)[1]) != titles(held_out)


def test_one_article_cannot_be_split():
    with pytest.raises(UserError) as error:
        hold_out_articles(make_passages(1), 0.1, seed=0)
    assert "--held-out 0.1" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("titled", [True, False])
def test_no_passage_is_on_both_sides_where_each_question_is_an_article(titled):
    """As some exporters write it: the passage anew for every question, under its own title or none."""
    articles = []
    for number in range(60):
        qas = [{"id": str(number), "question": f"what {number}?", "answers": [{"text": "passage", "answer_start": 0}]}]
        title = {"title": f"question {number}"} if titled else {}
        articles.append({"paragraphs": [{"context": f"passage {number % 12}", "qas": qas}], **title})
    training, held_out = training_split(parse_squad({"data": articles}, "file.json"), 0, 0.2, seed=0)
    texts = {passage.text for passage in training}
    assert len(texts) == 9 and texts.isdisjoint(passage.text for passage in held_out.passages)  # 3 of 12 passages: 25%
    assert len(questions(training)) == 45 and len(held_out.examples) == 15


@pytest.mark.parametrize("seed", range(30))
def test_joined_articles_are_the_connected_components(seed):
    """Against a search that floods from each title; passages with blank texts join nothing."""
    rng = random.Random(seed)
    example = Example("q", "what?", (), (), False, True)
    passages = [Passage(rng.choice("abcdefghij"), rng.choice(["", " ", *"0123456789ABCDEF"]), [example]) for _ in range(18)]
    neighbours = {title: {one.title for one in passages for other in passages if one.text == other.text and one.text.strip()
                          and other.title == title} for title in titles(passages)}
    components = set()
    for title in neighbours:
        component = {title}
        while (grown := component.union(*(neighbours[one] for one in component))) != component:
            component = grown
        components.add(frozenset(component))
    if len(components) < 2:
        with pytest.raises(UserError, match="--held-out 0.4: needs at least two articles without a passage in common"):
            hold_out_articles(passages, 0.4, seed)
        return
    training, held_out = hold_out_articles(passages, 0.4, seed)
    assert training and held_out
    assert all(component <= titles(training) or component <= titles(held_out) for component in components)
    assert not titles(training) & titles(held_out)


def test_samples_are_whole_passages_in_shuffled_order_and_nested():
    passages = make_passages(30)
    everything = first_passages(passages, 10**6, seed=5)
    assert sorted(map(identity, everything)) == sorted(map(identity, passages)) != list(map(identity, everything))
    for size in (1, 10, 57):
        part = first_passages(passages, size, seed=5)
        assert questions(part) == questions(everything)[:size]
        assert [passage.text for passage in part] == [passage.text for passage in everything[:len(part)]]
        assert all(passage.examples for passage in part)
    assert questions(first_passages(passages, 57, seed=6)) != questions(everything)[:57]


def identity(passage: Passage) -> tuple:
    return passage.title, passage.text, [example.id for example in passage.examples]


def test_a_sample_leaves_the_passages_as_they_are():
    passages = make_passages(3)
    before = list(map(identity, passages))
    for size in (1, 2, 3):
        first_passages(passages, size, seed=size)
        training_split(make_data(passages), size, 0.2, seed=size)
    assert list(map(identity, passages)) == before


def test_training_split_trains_on_trainable_questions_only_and_scores_all_held_out_ones():
    passages = make_passages(30)
    training, held_out = training_split(make_data(passages), max_questions=0, share=0.2, seed=0)
    held = titles(held_out.passages)
    assert questions(training) == [e for p in passages for e in p.examples if e.trainable and p.title not in held]
    assert all(passage.examples for passage in training)
    assert held_out.examples == [e for p in passages for e in p.examples if p.title in held]
    assert not all(e.trainable for e in held_out.examples) and held_out.has_answers and not held_out.is_v2


def test_max_questions_counts_trainable_questions_outside_the_held_out_articles():
    passages = make_passages(30)
    all_training, held_out = training_split(make_data(passages), 0, 0.2, seed=0)
    training, same_held_out = training_split(make_data(passages), 20, 0.2, seed=0)
    assert len(questions(training)) == 20 and questions(training) == questions(first_passages(all_training, 20, seed=0))
    assert same_held_out.examples == held_out.examples


@pytest.mark.parametrize("is_v2, share, expected",
                         [(False, None, 0.0), (True, None, 0.05), (True, 0, 0.0), (False, 0.1, 0.1)])
def test_held_out_share_is_five_percent_by_default_for_v2_alone(is_v2, share, expected):
    passages = make_passages(60)
    examples = questions(passages)
    training, held_out = training_split(make_data(passages, is_v2), 0, share, seed=0)
    if expected == 0:
        assert held_out is None and len(questions(training)) == sum(example.trainable for example in examples)
    else:
        assert expected <= len(held_out.examples) / len(examples) < expected + 0.1 and held_out.is_v2 == is_v2


def test_nothing_to_train_on_is_said_with_what_was_found():
    qas = [{"id": "b1", "question": "When?", "answers": ["1871"]}, {"id": "b2", "question": "Who?", "answers": "Ines Tarr"}]
    article = {"title": "t", "paragraphs": [{"context": "In 1871 by Ines Tarr.", "qas": qas}]}
    data = parse_squad({"data": [article]}, "file.json")
    with pytest.raises(UserError) as error:
        training_split(data, 0, 0.0, seed=0)
    assert "2 × answer of the type str, left out of training (e.g. b1)" in str(error.value) and "\n" not in str(error.value)


def test_nothing_to_train_on_is_said(small_squad):
    for article in small_squad["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                del question["answers"]
    with pytest.raises(UserError, match="--train-data file.json: no question .* the file has no answers"):
        training_split(parse_squad(small_squad, "file.json"), 0, 0.0, seed=0)
