"""Parts of a data set: whole articles are held out, samples are nested, and all of it is a function of the seed."""

import random

import pytest

from qa.data.splits import first_passages, hold_out_articles, training_split
from qa.data.squad import Answer, Example, SquadData, Summary, parse_squad
from qa.errors import UserError


def make_examples(num_articles: int, seed: int = 0) -> list[Example]:
    """Articles of 1 to 4 passages of 1 to 5 questions; two of ten questions cannot be trained on."""
    rng = random.Random(seed)
    examples = []
    for article in range(num_articles):
        for passage in range(rng.randint(1, 4)):
            context = f"passage {passage} of article {article}"
            for question in range(rng.randint(1, 5)):
                examples.append(Example(f"{article}-{passage}-{question}", f"title {article}", context, "what?",
                                        (Answer("passage", 0),), ("passage",), False, rng.random() < 0.8))
    return examples


def make_data(examples: list[Example], is_v2: bool = False, has_answers: bool = True) -> SquadData:
    return SquadData("file.json", examples, is_v2, has_answers, Summary())


def titles(examples: list[Example]) -> set[str]:
    return {example.title for example in examples}


@pytest.mark.parametrize("share", [0.02, 0.05, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("num_articles", [2, 7, 40])
def test_held_out_articles_are_whole_and_no_more_than_needed(num_articles, share):
    examples = make_examples(num_articles)
    training, held_out = hold_out_articles(examples, share, seed=3)
    assert training and held_out and not titles(training) & titles(held_out)
    assert sorted(training + held_out, key=examples.index) == examples  # a partition
    for part in (training, held_out):  # each in the file's order, so passages stay together
        assert part == [example for example in examples if example.title in titles(part)]
    # Enough, unless one article only is left to train on; and not without the last article drawn.
    assert len(held_out) >= share * len(examples) or len(titles(training)) == 1
    largest = max(sum(example.title == title for example in held_out) for title in titles(held_out))
    assert len(held_out) - largest < share * len(examples)


def test_split_is_a_function_of_the_seed_and_not_of_the_files_order():
    examples = make_examples(30)
    _, held_out = hold_out_articles(examples, 0.2, seed=1)
    assert titles(hold_out_articles(examples[::-1], 0.2, seed=1)[1]) == titles(held_out)
    assert titles(hold_out_articles(examples, 0.2, seed=2)[1]) != titles(held_out)


def test_one_article_cannot_be_split():
    with pytest.raises(UserError) as error:
        hold_out_articles(make_examples(1), 0.1, seed=0)
    assert "--held-out 0.1" in str(error.value) and "\n" not in str(error.value)


def test_samples_are_whole_passages_in_shuffled_order_and_nested():
    examples = make_examples(30)
    everything = first_passages(examples, 10**6, seed=5)
    assert sorted(everything, key=examples.index) == examples and everything != examples
    contexts = [example.context for example in everything]
    changes = sum(first != second for first, second in zip(contexts, contexts[1:], strict=False))
    assert changes + 1 == len(set(contexts))  # the questions of a passage stand together
    for size in (1, 10, 57):
        assert first_passages(examples, size, seed=5) == everything[:size]
    assert first_passages(examples, 57, seed=6) != everything[:57]


def test_passages_with_equal_text_in_two_articles_are_two():
    one, two = (Example(title, title, "same text", "what?", (), (), False, True) for title in "ab")
    mixed = [one, two, one, two]
    assert first_passages(mixed, 4, seed=0) in ([one, one, two, two], [two, two, one, one])


def test_training_split_trains_on_trainable_questions_only_and_scores_all_held_out_ones():
    examples = make_examples(30)
    training, held_out = training_split(make_data(examples), max_questions=0, share=0.2, seed=0)
    assert training == [e for e in examples if e.trainable and e.title not in titles(held_out.examples)]
    assert held_out.examples == [e for e in examples if e.title in titles(held_out.examples)]
    assert not all(e.trainable for e in held_out.examples) and held_out.has_answers and not held_out.is_v2


def test_max_questions_counts_trainable_questions_outside_the_held_out_articles():
    examples = make_examples(30)
    all_training, held_out = training_split(make_data(examples), 0, 0.2, seed=0)
    training, same_held_out = training_split(make_data(examples), 20, 0.2, seed=0)
    assert len(training) == 20 and training == first_passages(all_training, 20, seed=0)
    assert same_held_out.examples == held_out.examples


@pytest.mark.parametrize("is_v2, share, expected",
                         [(False, -1, 0.0), (True, -1, 0.05), (True, 0, 0.0), (False, 0.1, 0.1)])
def test_held_out_share_is_five_percent_by_default_for_v2_alone(is_v2, share, expected):
    examples = make_examples(60)
    training, held_out = training_split(make_data(examples, is_v2), 0, share, seed=0)
    if expected == 0:
        assert held_out is None and len(training) == sum(example.trainable for example in examples)
    else:
        assert expected <= len(held_out.examples) / len(examples) < expected + 0.1 and held_out.is_v2 == is_v2


def test_nothing_to_train_on_is_said(small_squad):
    for article in small_squad["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                del question["answers"]
    with pytest.raises(UserError, match="--train-data file.json: no question .* the file has no answers"):
        training_split(parse_squad(small_squad, "file.json"), 0, 0.0, seed=0)
