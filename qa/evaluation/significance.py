"""How sure a figure is, and whether two systems differ: intervals and a test over articles.

Questions of one article are not independent: a model that misreads the article gets many of them wrong. So the article is
what we count. With S_j the sum of the scores of article j, n_j its questions, and J articles of N questions in all:

    R      = sum_j S_j / N                                     the official figure
    R_j    = (sum_i S_i - S_j) / (N - n_j)                     the figure without article j
    Var R  = (J - 1) / J * sum_j (R_j - R)^2                   the jackknife (Tukey 1958)
    R +/- t sqrt(Var R)                                        t: Student's, 97.5%, J - 1 degrees of freedom

Two articles, 1 of 2 and 4 of 4 right: R = 5/6, R_1 = 1, R_2 = 1/2, Var R = (1/36 + 4/36) / 2, its root 26%. If all articles
have equally many questions, it is the t interval of their means. To count by question, each question is an article of its
own. That interval is far too short: in the tests' simulation it has the true value in 47% of the cases, the one by article
in 94 to 95% (20 articles and more).

A difference of two systems is the same with S_j = the difference of their sums. Where a system has runs of several seeds, S_j
is their mean, and the variance of the runs' figures, divided by their number, is added; t then has the degrees of freedom of
Welch (1947) and Satterthwaite (1946). The sum is safe: where seeds matter it is right, where they do not it is too long. The
seeds of a system with only one run are not in the interval: it is then about this run.

`sign_flip_p` asks: if the two systems were the same, each article's difference could as well have the other sign. In which
share of all signs is the whole difference at least as large? (Fisher's randomisation test; 1935, The Design of Experiments.)
Input: EM or F1 of every question, 0 to 1 (`question_scores` in metrics.py). Used by: evaluate.py, reporting/table.py.

Letters: S runs (seeds) of a system, N questions, J articles, T trials of a simulation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from qa.data.squad import counted

MIN_ARTICLES = 10  # with fewer, an interval means little
MAX_EXACT = 14  # articles: up to here all 2^J signs are tried, from here on this many drawn ones:
NUM_DRAWN = 9_999
FIGURES = {"EM": "exact", "F1": "f1"}  # figure -> its key in per_question.json


class Interval(NamedTuple):
    """A figure, or a difference, in percent, with its 95% interval; nan to nan if there is only one article."""

    estimate: float
    low: float
    high: float

    def bounds(self, sign: str = "") -> str:
        lowest = -100.0 if sign else 0.0  # a figure is not below 0, a difference is
        low, high = max(self.low, lowest), min(self.high, 100.0)
        return "[no interval]" if math.isnan(self.low) else f"[{low:{sign}.2f}, {high:{sign}.2f}]"


def interval(scores: np.ndarray, titles: list[str]) -> Interval:
    """The mean of `scores`, [N] or [S, N], with its interval by article. `titles` [N]: the article of each question."""
    return difference(scores, np.zeros(len(titles)), titles)


def difference(scores: np.ndarray, others: np.ndarray, titles: list[str]) -> Interval:
    """The mean of `scores` minus that of `others`: two systems on the same questions, [N] or [S, N] each."""
    sizes, sums = article_sums(scores, titles)
    estimate, half_width = t_interval(sums, article_sums(others, titles)[1], sizes)
    return Interval(*(100 * float(value) for value in (estimate, estimate - half_width, estimate + half_width)))


def article_sums(scores: np.ndarray, titles: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Questions of each article, [J], and the sums of their scores, [S, J]."""
    _, article = np.unique(np.asarray(titles), return_inverse=True)  # [N]
    return np.bincount(article), np.stack([np.bincount(article, weights=run) for run in np.atleast_2d(scores)])


def t_interval(sums: np.ndarray, others: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The difference of two systems, and half the length of its interval. sums, others: [..., S, J]; sizes: [..., J]."""
    num_articles, total = sizes.shape[-1], sizes.sum(-1)  # [...]
    of_article = sums.mean(-2) - others.mean(-2)  # [..., J]
    estimate = of_article.sum(-1) / total
    if num_articles == 1:
        return estimate, estimate * np.nan
    without = (of_article.sum(-1, keepdims=True) - of_article) / (total[..., None] - sizes)  # [..., J] R_j
    changes = without - estimate[..., None]
    parts = [((num_articles - 1) / num_articles * (changes**2).sum(-1), num_articles - 1)]  # variance, degrees of freedom
    for runs in (sums, others):
        if (num_runs := runs.shape[-2]) > 1:
            parts.append(((runs.sum(-1) / total[..., None]).var(-1, ddof=1) / num_runs, num_runs - 1))
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / np.maximum(sum(part**2 / degrees for part, degrees in parts), 1e-300)
    return estimate, t_quantile(freedom) * np.sqrt(variance)


def t_quantile(freedom: np.ndarray | float) -> np.ndarray:
    """t with P(-t < T < t) = 95% for Student's T with `freedom` degrees, of any shape; below 1 taken as 1.

    With T = sqrt(freedom) tan(angle) the density of the angle is proportional to cos(angle)^(freedom - 1), from -90 to 90
    degrees, and easy to integrate. Beyond 10,000 degrees of freedom t hardly changes: 1.9602 there, 1.9600 at the end.
    """
    freedom = np.clip(freedom, 1, 10_000)
    angle = math.pi / 2 * np.linspace(0, 1, 4_001) ** 2  # denser near 0, where the mass is if there are many degrees
    found = {}
    for degrees in np.unique(freedom):
        density = np.cos(angle) ** (degrees - 1)
        below = np.append(0, np.cumsum((density[1:] + density[:-1]) * np.diff(angle)))
        found[degrees] = math.sqrt(degrees) * math.tan(np.interp(0.95, below / below[-1], angle))
    return np.vectorize(found.get, otypes=[float])(freedom)


def sign_flip_p(differences: np.ndarray) -> np.ndarray:
    """The two-sided p of the test by article. differences [..., J]: of the sums of each article's scores.

    Exact for few articles; else over drawn signs, always the same ones, and the signs as they are.
    """
    num_articles = differences.shape[-1]
    if num_articles <= MAX_EXACT:
        signs = 1 - 2 * (np.arange(2**num_articles)[:, None] >> np.arange(num_articles) & 1)
    else:
        drawn = np.random.default_rng(0).choice([-1, 1], (NUM_DRAWN, num_articles))
        signs = np.concatenate([np.ones((1, num_articles), dtype=int), drawn])
    found = np.abs(differences.sum(-1))[..., None]
    rounding = 1e-9 * np.abs(differences).sum(-1)[..., None]
    return (np.abs(differences @ signs.T.astype(float)) >= found - rounding).mean(-1)


def describe(questions: dict[str, dict], others: dict[str, dict] | None = None, name: str = "") -> str:
    """For a terminal: how sure the figures are and, with `others` (a system called `name`), the difference.

    questions, others: what per_question.json holds, of the same questions in the same order.
    """
    titles, ids = [entry["title"] for entry in questions.values()], list(questions)
    columns = {figure: np.array([entry[key] for entry in questions.values()]) for figure, key in FIGURES.items()}  # [N] each
    by_article, by_question = (", ".join(f"{figure} {interval(column, groups).bounds()}" for figure, column in columns.items())
                               for groups in (titles, ids))
    articles = counted(len(set(titles)), "article")
    few = ", fewer than 10: the interval means little" if len(set(titles)) < MIN_ARTICLES else ""
    lines = [f"95% intervals by article ({articles}{few}): {by_article}; by question: {by_question}"]
    if others is not None:
        lines.append(f"this minus {name}, with intervals by article, and p of a sign-flip test by article:")
        for figure, column in columns.items():
            changes = column - np.array([entry[FIGURES[figure]] for entry in others.values()])
            found, p = interval(changes, titles), sign_flip_p(article_sums(changes, titles)[1][0])
            lines.append(f"  {figure} {found.estimate:+.2f} {found.bounds('+')}, p {p:.2g}; by question "
                         f"{interval(changes, ids).bounds('+')}; {counted(int((changes > 0).sum()), 'question')} better, "
                         f"{(changes < 0).sum():,} worse")
    return "\n".join(lines)
