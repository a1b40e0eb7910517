"""Parts of a data set: whole articles kept out of training, and the first N questions of shuffled passages.

Used by the train scripts, before any features are made. All functions are pure in (passages, seed), and make passages of
their own where they leave questions out.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from qa.data.squad import Example, Passage, SquadData, Summary
from qa.errors import UserError


def training_split(data: SquadData, max_questions: int | None, share: float | None,
                   seed: int) -> tuple[list[Passage], SquadData | None]:
    """What a training script learns from, and what it chooses checkpoint and threshold on.

    Args:
        max_questions: `--max-train-questions`, of the articles that are not held out; None: all.
        share: `--held-out`; None is 5% for v2.0 data, whose no-answer threshold must be chosen somewhere, else 0.

    Raises:
        UserError: nothing to train on.
    """
    passages, held_out = data.passages, []
    share = (0.05 if data.is_v2 else 0.0) if share is None else share
    if share > 0:
        passages, held_out = hold_out_articles(passages, share, seed)
    training = questions_that(lambda example: example.trainable, passages)
    if max_questions:
        training = first_passages(training, max_questions, seed)
    if not training:
        raise UserError(f"--train-data {data.source}: no question that can be trained on"
                        + ("" if data.has_answers else ": the file has no answers") + data.summary.reasons())
    held_data = SquadData(f"held-out articles of {data.source}", held_out, data.is_v2, True, Summary()) if held_out else None
    return training, held_data


def hold_out_articles(passages: list[Passage], share: float, seed: int) -> tuple[list[Passage], list[Passage]]:
    """Split into (training, held out) by article, so that no passage or topic is on both sides.

    Articles are drawn in shuffled order until the held-out side has at least `share` of the questions. Articles that have a
    passage in common are one: some files have an article, and the whole passage, for every question.

    Raises:
        UserError: fewer than two articles, or a share that leaves nothing to train on.
    """
    article_of = _joined_articles(passages)
    sizes: Counter[str] = Counter()
    for passage in passages:
        sizes[article_of[passage.title]] += len(passage.examples)
    if len(sizes) < 2:
        raise UserError(f"--held-out {share:g}: needs at least two articles (titles) without a passage in common, found "
                        f"{len(article_of)} title(s) of {len(sizes)} (v2.0 data has 5% held out by default); use "
                        "--held-out 0, or give each document its own title")
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
    """{title: the first title of its article}, by a union-find: titles are joined by a passage with the same text."""
    parent: dict[str, str] = {}
    first_title: dict[str, str] = {}

    def root(title: str) -> str:
        while parent[title] != title:
            parent[title] = title = parent[parent[title]]
        return title

    for passage in passages:
        parent.setdefault(passage.title, passage.title)
        if passage.text.strip():  # an empty passage joins nothing
            first, second = sorted((root(passage.title), root(first_title.setdefault(passage.text, passage.title))))
            parent[second] = first
    return {title: root(title) for title in parent}


def first_passages(passages: list[Passage], num_questions: int, seed: int) -> list[Passage]:
    """Passages in shuffled order, with all their questions, until there are exactly `num_questions` (the last one may be cut).

    A smaller number gives a prefix of a larger one's questions, so learning curves are nested.
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
    """The passages with the questions that are to be kept, without those that have none of them."""
    kept = [replace(passage, examples=list(filter(keep, passage.examples))) for passage in passages]
    return [passage for passage in kept if passage.examples]
