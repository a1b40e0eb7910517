"""The figures of a report, as rows of texts: a row for each system, a row for each two systems.

Every figure is in percent, the mean over the seeds; intervals and p are by article (evaluation/significance.py). The spread is
the standard deviation of the seeds' figures. Used by: page.py, qa/report.py (`--markdown`).
"""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

from qa.data.squad import counted
from qa.evaluation.significance import (
    FIGURES,
    MIN_ARTICLES,
    NUM_DRAWN,
    Interval,
    article_sums,
    difference,
    interval,
    sign_flip_p,
)
from qa.options import flag
from qa.reporting.systems import System

NONE = "–"  # unknown
MAX_ALL_PAIRS = 6  # with more systems, each is compared with the best one alone

Rows = list[list[str]]  # the first one has the names of the columns


def system_rows(systems: list[System]) -> Rows:
    """The systems in their order."""
    figures = [name for figure in FIGURES for name in (figure, "95% interval")]
    rows = [["System", "Seeds", *figures, "Training questions", "Trained parameters", "Training time", "Speed", "Recipe"]]
    for system in systems:
        first, titles = system.evaluations[0], list(system.evaluations[0].titles.values())
        row = [system.label, str(len(system.evaluations))]
        for key in FIGURES.values():
            scores = system.scores(key)  # [S, N]
            found, of_seeds = interval(scores, titles), 100 * scores.mean(axis=1)
            row += [f"{found.estimate:.1f}" + (f" ± {of_seeds.std(ddof=1):.1f}" if len(of_seeds) > 1 else ""), bounds(found)]
        count = first.num_trained_parameters()
        times = [seconds for run in system.evaluations if (seconds := run.train_seconds()) is not None]
        time = duration(statistics.fmean(times)) if times else NONE
        size = f"{system.size:,}" if system.size else NONE
        rows.append([*row, size, f"{count:,}" if count else NONE, time, speed(system), recipe(system)])
    return rows


def bounds(found: Interval, sign: str = "") -> str:
    """ "32.1 to 41.0"."""
    low, high = max(found.low, -100.0 if sign else 0.0), min(found.high, 100.0)
    return NONE if math.isnan(found.low) else f"{low:{sign}.1f} to {high:{sign}.1f}".replace("-", "−")


def recipe(system: System) -> str:
    """ "all-MiniLM-L6-v2, lr 0.0001, 313 updates of 8; decode exact": of the training, then of the evaluation."""
    first = system.evaluations[0]
    settings = [f"{flag(name)[2:]} {value}" for name, value in first.settings().items()]
    return "; ".join([*filter(None, [_trained(first.options)]), *settings]) or NONE


def _trained(options: dict[str, Any]) -> str:
    """Of a model that we did not train: ""."""
    if not options:
        return ""
    length = (f"{counted(options['max_steps'], 'update')} of {options['batch_size']}" if options.get("max_steps") else
              f"{counted(options['epochs'], 'epoch')}, batch {options['batch_size']}")
    path = Path(options.get("model") or "")
    model = path.parent.name if path.name == "model" else path.name  # the product of a run: the run's name
    return f"{model}{', ' if model else ''}lr {options['lr']:g}, {length}"


def duration(seconds: float) -> str:
    """ "45 s", "7.6 min", "2.1 h"."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def speed(system: System) -> str:
    """The median over the lines of the logs: "5.5 windows/s" (BERT), "2.0 questions/s" (LoRA)."""
    for item in ("windows", "questions"):
        rates = [line[f"{item}_per_second"] for run in system.evaluations for line in run.log() if f"{item}_per_second" in line]
        if rates:
            return f"{statistics.median(rates):.1f} {item}/s"
    return NONE


def difference_rows(systems: list[System]) -> Rows:
    """The better one minus the other, in F1; the pairs with the best systems first."""
    ranked = sorted(systems, key=lambda system: -system.scores("f1").mean())
    pairs = [pair for pair in itertools.combinations(ranked, 2) if len(ranked) <= MAX_ALL_PAIRS or pair[0] is ranked[0]]
    rows = [["System", "minus", *(name for figure in FIGURES for name in (figure, "95% interval", "p"))]]
    for one, other in pairs:
        row, titles = [one.label, other.label], list(one.evaluations[0].titles.values())
        for key in FIGURES.values():
            scores, others = one.scores(key), other.scores(key)  # [S, N] each
            found = difference(scores, others, titles)
            p = float(sign_flip_p(article_sums(scores.mean(0) - others.mean(0), titles)[1][0]))
            row += [f"{found.estimate:+.1f}".replace("-", "−"), bounds(found, "+"), "< 0.001" if p < 0.001 else f"{p:.3f}"]
        rows.append(row)
    return rows


def caution(systems: list[System]) -> list[str]:
    """What the intervals are worth; and what p is, if there is one."""
    num_articles = len(set(systems[0].evaluations[0].titles.values()))
    few = f" That is fewer than {MIN_ARTICLES}, so they mean little." if num_articles < MIN_ARTICLES else ""
    lines = [f"Intervals and p are by article: there {'is' if num_articles == 1 else 'are'} {counted(num_articles, 'article')}."
             + few]
    if len(systems) > 1:
        least = max(2.0 ** (1 - num_articles), 1 / (NUM_DRAWN + 1))
        lines.append(f"p is of a sign-flip test, here at least {least:.2g}, and not corrected for the number of comparisons. "
                     "The intervals count the spread of the seeds, too; p does not, so the two may disagree.")
    if len(systems) > MAX_ALL_PAIRS:
        lines.append("Each system is compared with the best one alone, which was found on the same questions.")
    return lines


def markdown(rows: Rows) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
