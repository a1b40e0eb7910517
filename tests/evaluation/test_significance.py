"""Intervals that have the true value 95 times in 100, and a test that finds a difference by chance 5 times in 100.

One worked case. Two articles, 1 of 2 and 4 of 4 questions right: R = 5/6; without the first 1, without the second 1/2;
Var R = ((1/6)^2 + (1/3)^2) / 2 = 0.0694, so the interval is 83.3% +/- 12.706 * 26.4%.

Coverage of the 95% interval of one system, as `test_coverage_of_the_interval` measures it: articles differ (a logit with a
standard deviation of 0.8), and so do their sizes (a logarithm with one of 0.5):

    articles             4      7     10     20     48    100
    by article, %     93.0   93.6   93.0   93.9   94.8   94.5
    by question, %    48.3   48.5   46.8   47.4   46.9   46.9

Coverage for the difference of two systems, 20 articles, as `test_coverage_over_seeds` measures it; in brackets by articles
alone, as if the runs of other seeds would give the same figures:

    three runs each, seeds matter as much as articles     96.2%  (79.7%)
    three runs each, seeds matter little                  96.6%  (92.8%)
    three runs each, seeds and articles do not matter     99.0%  (93.6%)
    one run each, seeds do not matter                     95.4%

The 5% test fires in 4.3% (20 articles) and 4.9% (48) of 10,000 trials without a difference, in 3.2% with 7 articles, and
never with 4, whose 16 signs leave no p below 1/8.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from qa.evaluation.significance import (
    article_sums,
    describe,
    difference,
    interval,
    sign_flip_p,
    t_interval,
    t_quantile,
)

TITLES = ["a", "b", "b", "a", "b", "b"]
SCORES = np.array([1.0, 1, 1, 0, 1, 1])


def test_worked_case():
    sizes, sums = article_sums(SCORES, TITLES)
    assert (sizes.tolist(), sums.tolist()) == ([2, 4], [[1, 4]])
    half = 12.7062 * math.sqrt(5 / 72)
    assert interval(SCORES, TITLES) == pytest.approx([100 * value for value in (5 / 6, 5 / 6 - half, 5 / 6 + half)], abs=1e-3)


@pytest.mark.parametrize("freedom, expected", [
    (1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (6, 2.447), (7, 2.365), (8, 2.306), (9, 2.262), (10, 2.228),
    (12, 2.179), (15, 2.131), (19, 2.093), (20, 2.086), (30, 2.042), (40, 2.021), (60, 2.000), (120, 1.980), (1e4, 1.960),
    (1e9, 1.960)])
def test_t_is_that_of_the_printed_tables(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, abs=6e-4)


def test_t_takes_degrees_of_any_shape_and_between_whole_numbers():
    found = t_quantile(np.array([[1.0, 2.5], [3, 0]]))
    assert found.shape == (2, 2) and found[1, 1] == found[0, 0] and found[0, 0] > 4.303 > found[0, 1] > 3.182


def test_estimate_is_the_official_figure_and_by_question_is_the_textbook_interval():
    scores = np.random.default_rng(0).random(500)
    titles = [f"article {number % 7 * (number % 3)}" for number in range(500)]
    assert interval(scores, titles).estimate == pytest.approx(100 * scores.mean(), abs=1e-12)
    found = interval(scores, [str(number) for number in range(500)])
    half = 196.47 * scores.std(ddof=1) / math.sqrt(500)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=1e-4)


def test_equal_articles_give_the_t_interval_of_their_means():
    scores = np.random.default_rng(1).random((5, 8))
    found, means = interval(scores.flatten(), np.repeat(list("abcde"), 8).tolist()), scores.mean(1)
    assert found.high - found.estimate == pytest.approx(277.645 * means.std(ddof=1) / math.sqrt(5), rel=1e-4)


def test_seeds_add_the_variance_of_their_figures():
    """Three runs of two systems, articles that differ in nothing: what is left is Welch's interval of the runs' figures."""
    runs, others = np.array([0.5, 0.7, 0.6]), np.array([0.1, 0.2, 0.3])
    found = difference(np.tile(runs[:, None], 40), np.tile(others[:, None], 40), ["x", "y", "y", "z"] * 10)
    half = 277.645 * math.sqrt(0.01 / 3 + 0.01 / 3)  # equal variances, 2 degrees of freedom each: 4 in all
    assert found == pytest.approx([40, 40 - half, 40 + half], abs=1e-2)


def questions(scores, titles) -> dict[str, dict]:
    return {str(row): {"title": title, "exact": score, "f1": score / 2}
            for row, (title, score) in enumerate(zip(titles, scores, strict=True))}


def test_one_article_has_no_interval_and_few_mean_little():
    found = interval(SCORES, ["a"] * 6)
    assert found.estimate == pytest.approx(500 / 6) and math.isnan(found.low) and found.bounds() == "[no interval]"
    line = describe(questions(SCORES, ["a"] * 6))
    assert "(1 article, fewer than 10: the interval means little): EM [no interval], F1 [no interval]; by question: " in line
    assert "(9 articles, fewer than 10" in describe(questions(np.arange(9) % 2.0, "abcdefghi"))
    assert "(10 articles): EM [" in describe(questions(np.arange(10) % 2.0, "abcdefghij"))


def test_difference_is_told_with_its_changes():
    titles = [letter for letter in "abcdefghijkl" for _ in range(5)]
    better = np.tile([1.0, 1, 0, 1, 0], 12)
    worse = np.tile([0.0, 1, 0, 1, 0], 12)
    worse[2] = 1
    first, head, em, f1 = describe(questions(better, titles), questions(worse, titles), "runs/x").splitlines()
    assert first.startswith("95% intervals by article (12 articles): EM [60.00, 60.00], F1 [30.00, 30.00]; by question: EM [4")
    assert head.startswith("this minus runs/x, ")
    assert em == "  EM +18.33 [+14.67, +22.00], p 0.00098; by question [+7.19, +29.48]; 12 questions better, 1 worse"
    assert f1.startswith("  F1 +9.17 [+7.33, +11.00], p 0.00098; ")


# ---- the test by article ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("num_articles", [1, 2, 5, 9])
def test_few_articles_are_tested_over_all_signs(num_articles):
    """Brute force, also with ties: differences of whole questions."""
    for differences in np.random.default_rng(num_articles).integers(-3, 4, (20, num_articles)):
        flipped = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
                   for signs in itertools.product([-1, 1], repeat=num_articles)]
        assert sign_flip_p(differences) == np.mean([value >= abs(sum(differences)) for value in flipped])


def test_many_articles_are_tested_over_drawn_signs_and_agree_with_the_normal_law():
    differences = np.random.default_rng(3).normal(0.15, 1, (20, 200))
    found = sign_flip_p(differences)
    z = np.abs(differences.sum(1)) / np.sqrt((differences**2).sum(1))
    assert found == pytest.approx([math.erfc(value / math.sqrt(2)) for value in z], abs=0.02)
    assert found.min() < 0.02 and np.array_equal(found, sign_flip_p(differences))  # the same signs again
    assert sign_flip_p(np.ones(40)) == 1e-4  # never 0
    assert sign_flip_p(np.zeros(40)) == sign_flip_p(np.zeros(4)) == 1


# ---- simulations ------------------------------------------------------------------------------------------------------

def draw_sizes(generator, trials: int, num_articles: int) -> np.ndarray:
    """[T, J] questions of an article: 50 in the middle, every twentieth has more than 110."""
    return np.maximum(1, np.exp(generator.normal(np.log(50), 0.5, (trials, num_articles))).round()).astype(int)


def share_right(generator, shape: tuple) -> np.ndarray:
    """The probability of a right answer, for each article."""
    return 1 / (1 + np.exp(-generator.normal(0.5, 0.8, shape)))


@pytest.mark.parametrize("num_articles", [4, 7, 10, 20, 48, 100])
def test_coverage_of_the_interval(num_articles):
    """Right answers are drawn for each question, with the probability of its article."""
    generator = np.random.default_rng(num_articles)
    sizes, truth = draw_sizes(generator, 10_000, num_articles), share_right(generator, (4_000_000,)).mean()
    right = generator.binomial(sizes, share_right(generator, sizes.shape))[:, None]  # [T, 1, J]
    estimate, half = t_interval(right, np.zeros_like(right), sizes)
    coverage = (np.abs(estimate - truth) <= half).mean()
    by_question = (np.abs(estimate - truth) <= 1.96 * np.sqrt(estimate * (1 - estimate) / sizes.sum(1))).mean()
    print(f"{num_articles} articles: {coverage:.2%} by article, {by_question:.2%} by question")
    assert 0.93 <= coverage <= 0.97 or num_articles < 20
    assert by_question < 0.7


def draw_systems(generator, sizes, num_runs, article, seed) -> list[np.ndarray]:
    """The sums of two systems, [T, S, J], that are equally good: `article` and `seed` are the standard deviations of what an
    article adds to a system, and a seed to a run; what a seed adds in an article has 0.02, a question's chance 0.4."""
    trials, num_articles = sizes.shape
    systems = []
    for _ in range(2):
        mean = (0.6 + generator.normal(0, article, (trials, 1, num_articles)) + generator.normal(0, seed, (trials, num_runs, 1))
                + generator.normal(0, 0.02, (trials, num_runs, num_articles)))
        systems.append(mean * sizes[:, None] + generator.normal(0, 0.4, mean.shape) * np.sqrt(sizes)[:, None])
    return systems


@pytest.mark.parametrize("num_articles, article, seed, num_runs, lowest, highest", [
    (20, 0.05, 0.03, 3, 0.93, 0.97), (48, 0.05, 0.03, 3, 0.93, 0.97), (20, 0.05, 0.01, 3, 0.93, 0.98), (20, 0, 0, 3, 0.97, 1),
    (20, 0.05, 0.0, 1, 0.93, 0.97)])
def test_coverage_over_seeds(num_articles, article, seed, num_runs, lowest, highest):
    generator = np.random.default_rng(num_articles)
    sizes = draw_sizes(generator, 3_000, num_articles)
    a, b = draw_systems(generator, sizes, num_runs, article, seed)
    estimate, half = t_interval(a, b, sizes)
    coverage = (np.abs(estimate) <= half).mean()
    estimate, half = t_interval(a.mean(1, keepdims=True), b.mean(1, keepdims=True), sizes)
    print(f"{num_articles} articles, {num_runs} runs, article {article}, seed {seed}: {coverage:.2%}; without seeds "
          f"{(np.abs(estimate) <= half).mean():.2%}")
    assert lowest <= coverage <= highest


@pytest.mark.parametrize("num_articles", [4, 7, 20, 48])
def test_the_test_fires_by_chance_in_5_of_100(num_articles):
    """Two systems that are equally good in every article: 10,000 trials."""
    generator = np.random.default_rng(num_articles)
    sizes = draw_sizes(generator, 10_000, num_articles)
    share = share_right(generator, sizes.shape)
    differences = (generator.binomial(sizes, share) - generator.binomial(sizes, share)).astype(float)  # [T, J]
    fires = np.mean([sign_flip_p(part) <= 0.05 for part in np.split(differences, 40)])
    print(f"{num_articles} articles: {fires:.2%}")
    assert 0.04 <= fires <= 0.06 or num_articles < 20 and fires < 0.05


def test_the_test_finds_a_difference():
    generator = np.random.default_rng(0)
    sizes = draw_sizes(generator, 500, 20)
    share = share_right(generator, sizes.shape)
    differences = generator.binomial(sizes, np.minimum(share + 0.08, 1)) - generator.binomial(sizes, share)
    assert (sign_flip_p(differences) <= 0.05).mean() > 0.8
