"""Parts of a data set: whole articles held out of training, and the first N questions of shuffled passages.

The results depend on (passages, seed) only, and the input is not changed. Input: passages from squad.py. Used by: the train
scripts, evaluate.py (`first_passages`), qa/reader.py (`questions_that`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from qa.data.squad import Example, Passage, SquadData, Summary, counted
from qa.errors import UserError


def training_split(data: SquadData, max_questions: int | None, share: float | None,
                   seed: int) -> tuple[list[Passage], SquadData | None]:
    """The passages to learn from, and the held-out data: on these the run chooses its best step, and the threshold.

    `max_questions` is `--max-train-questions`, from the articles that are not held out; None: all. `share` is `--held-out`;
    None means 5% for v2.0 data, which needs a no-answer threshold, else 0. Nothing to learn from is a UserError.
    """
    passages, held_out = data.passages, []
    share = (0.05 if data.is_v2 else 0.0) if share is None else share
    if share > 0:
        passages, held_out = hold_out_articles(passages, share, seed, data.summary.reasons())
    training = questions_that(lambda example: example.trainable, passages)
    if max_questions:
        training = first_passages(training, max_questions, seed)
    if not training:
        raise UserError(f"--train-data {data.source}: no question that can be trained on"
                        + ("" if data.has_answers else ": the file has no answers") + data.summary.reasons())
    held_data = SquadData(f"held-out articles of {data.source}", held_out, data.is_v2, True, Summary()) if held_out else None
    return training, held_data


def hold_out_articles(passages: list[Passage], share: float, seed: int,
                      reasons: str = "") -> tuple[list[Passage], list[Passage]]:
    """Split into (training, held out) by article, so that no passage and no topic is in both.

    Shuffled articles are held out one by one, until they have at least `share` of the questions. Articles with a passage in
    common count as one: some files repeat the article and the passage for every question. Fewer than two are a UserError,
    which ends with `reasons`.
    """
    article_of = _joined_articles(passages)
    sizes = Counter(article_of[passage.title] for passage in passages for _ in passage.examples)  # questions of each article
    if len(sizes) < 2:
        raise UserError(f"--held-out {share:g}: needs at least two articles without a passage in common, found {len(sizes)} "
                        f"(with {counted(len(article_of), 'title')}; for v2.0 data the default is 0.05); use --held-out 0, or "
                        "give each document its own title" + reasons)
    articles = sorted(sizes)
    random.Random(seed).shuffle(articles)
    held, num_held = set(), 0
    for article in articles[:-1]:  # the last article always stays in training
        if num_held >= share * sizes.total():
            break
        held.add(article)
        num_held += sizes[article]
    training = [passage for passage in passages if article_of[passage.title] not in held]
    return training, [passage for passage in passages if article_of[passage.title] in held]


def _joined_articles(passages: list[Passage]) -> dict[str, str]:
    """{title: the first title of its article}, by union-find: a passage that two titles have makes them one article."""
    parent: dict[str, str] = {}
    first_title: dict[str, str] = {}

    def root(title: str) -> str:
        while parent[title] != title:
            parent[title] = title = parent[parent[title]]
        return title

    for passage in passages:
        parent.setdefault(passage.title, passage.title)
        if passage.text.strip():  # an empty passage joins no titles
            first, second = sorted((root(passage.title), root(first_title.setdefault(passage.text, passage.title))))
            parent[second] = first
    return {title: root(title) for title in parent}


def first_passages(passages: list[Passage], num_questions: int, seed: int) -> list[Passage]:
    """Shuffled passages with all their questions, until there are `num_questions`: the last passage may lose some.

    A larger number keeps the questions of a smaller one and adds to them, so learning curves are comparable.
    """
    order = list(passages)
    random.Random(seed).shuffle(order)
    chosen = []
    for passage in order:
        if num_questions <= 0:
            break
        chosen.append(replace(passage, examples=passage.examples[:num_questions]))
        num_questions -= len(passage.examples)
    return chosen


def questions_that(keep: Callable[[Example], bool], passages: list[Passage]) -> list[Passage]:
    """The passages with the questions that `keep` keeps; a passage without any is left out."""
    kept = [replace(passage, examples=list(filter(keep, passage.examples))) for passage in passages]
    return [passage for passage in kept if passage.examples]
