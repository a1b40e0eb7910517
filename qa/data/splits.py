"""Parts of a data set: whole articles kept out of training, and the first N questions of shuffled passages.

Used by the train scripts, before any features are made. Both functions are pure in (examples, seed).
"""

from __future__ import annotations

import random

from qa.data.squad import Example, SquadData, Summary
from qa.errors import UserError


def training_split(data: SquadData, max_questions: int, share: float, seed: int) -> tuple[list[Example], SquadData | None]:
    """What a training script learns from, and what it chooses checkpoint and threshold on.

    Args:
        max_questions: `--max-train-questions`, of the articles that are not held out; 0: all.
        share: `--held-out`; -1 stands for 5% for v2.0 data, whose no-answer threshold must be chosen somewhere, else 0.

    Raises:
        UserError: nothing to train on.
    """
    examples, held_out = data.examples, []
    share = (0.05 if data.is_v2 else 0.0) if share < 0 else share
    if share > 0:
        examples, held_out = hold_out_articles(examples, share, seed)
    training = [example for example in examples if example.trainable]
    if max_questions:
        training = first_passages(training, max_questions, seed)
    if not training:
        raise UserError(f"--train-data {data.source}: no question that can be trained on"
                        + ("" if data.has_answers else ": the file has no answers"))
    held_data = SquadData(f"held-out articles of {data.source}", held_out, data.is_v2, True, Summary()) if held_out else None
    return training, held_data


def hold_out_articles(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split into (training, held out) by article, so that no passage or topic is on both sides.

    Articles are drawn in shuffled order until the held-out side has at least `share` of the questions.

    Raises:
        UserError: fewer than two articles, or a share that leaves nothing to train on.
    """
    sizes: dict[str, int] = {}
    for example in examples:
        sizes[example.title] = sizes.get(example.title, 0) + 1
    if len(sizes) < 2:
        raise UserError(f"--held-out {share:g}: needs at least two articles (titles), found {len(sizes)}; "
                        "use --held-out 0, or give each document its own title")
    titles = sorted(sizes)
    random.Random(seed).shuffle(titles)
    held, num_held = set(), 0
    for title in titles[:-1]:  # the last article always stays in training
        if num_held >= share * len(examples):
            break
        held.add(title)
        num_held += sizes[title]
    training = [example for example in examples if example.title not in held]
    return training, [example for example in examples if example.title in held]


def first_passages(examples: list[Example], num_questions: int, seed: int) -> list[Example]:
    """Passages in shuffled order, with all their questions, until there are exactly `num_questions` (the last one may be cut).

    A smaller number gives a prefix of a larger one's questions, so learning curves are nested.
    """
    passages: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        passages.setdefault((example.title, example.context), []).append(example)
    order = list(passages.values())
    random.Random(seed).shuffle(order)
    return [example for passage in order for example in passage][:num_questions]
