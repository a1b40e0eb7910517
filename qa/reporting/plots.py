"""The plots of a report. The only file that imports matplotlib, which is an extra (requirements-report.txt).

Each function of PLOTS draws one figure from the systems and their questions (None: the data is not at hand). What it needs and
does not find, it says in a `Missing`. A system has the same colour everywhere, from the palette of Okabe and Ito (2008), which
the colour-blind can tell apart, less its yellow and black. A curve has a colour; each size has a marker and a kind of dashes.

Used by: page.py (`svg`, into the page), qa/report.py (`svg`, into files).
"""

from __future__ import annotations

import io
import re

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from qa.data.squad import counted
from qa.evaluation.calibration import NUM_BINS, calibration_error, coverage_area
from qa.evaluation.metrics import question_scores, threshold_curves
from qa.evaluation.significance import FIGURES, interval
from qa.reporting.questions import Question, best_spans, breakdowns
from qa.reporting.systems import FAMILIES, System

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F"]  # one for each curve, then again
MARKERS, DASHES = "osD^v", ["-", "--", "-.", ":", (0, (7, 1))]  # one for each size
INK = "#1B2733"  # text and axes; in the page it becomes the colour of the page's text
STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "text.parse_math": False, "text.color": INK,
         "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.color": INK, "grid.alpha": 0.12, "legend.frameon": False,
         "axes.titlesize": 9, "axes.titleweight": "bold", "figure.constrained_layout.use": True, "lines.linewidth": 1.6}


class Missing(Exception):
    """Why there is no plot: a sentence for the page."""


def look(system: System) -> dict:
    again, colour = divmod(system.curve, len(COLOURS))
    place = (system.place + again) % len(MARKERS)
    return {"color": COLOURS[colour], "marker": MARKERS[place], "linestyle": DASHES[place], "markersize": 5}


def line(system: System) -> dict:
    return {**look(system), "marker": ""}


def draw(axes: Axes, x: np.ndarray, y: np.ndarray, system: System) -> None:
    """A line; of some 300 of its points, if it has more."""
    kept = np.unique(np.linspace(0, len(x) - 1, 300).astype(int))
    axes.plot(x[kept], y[kept], **line(system))


def learning_curves(systems: list[System], questions: list[Question] | None) -> Figure:
    curves: dict[int, list[System]] = {}
    for system in systems:
        if system.size:
            curves.setdefault(system.curve, []).append(system)
    if not any(len(curve) > 1 for curve in curves.values()):
        raise Missing("A learning curve needs runs that differ in --max-train-questions and in nothing else but their recipe.")
    figure, lines = Figure((7.2, 3.4)), {}
    for axes, (name, key) in zip(figure.subplots(1, 2, sharey=True), FIGURES.items(), strict=True):
        for curve in curves.values():
            colour, titles = look(curve[0])["color"], list(curve[0].evaluations[0].titles.values())
            sizes, found = [system.size for system in curve], [interval(system.scores(key), titles) for system in curve]
            axes.plot(sizes, [one.estimate for one in found], color=colour)
            if len(curve) > 1:
                axes.fill_between(sizes, [one.low for one in found], [one.high for one in found], color=colour, alpha=0.1)
            for system in curve:
                of_seeds = 100 * system.scores(key).mean(axis=1)
                axes.plot([system.size] * len(of_seeds), of_seeds, **{**look(system), "linestyle": ""}, alpha=0.7)
            lines[curve_label(curve)] = {"color": colour}
        sizes = sorted({system.size for curve in curves.values() for system in curve})
        axes.set(xscale="log", xlabel="training questions (logarithmic)", ylabel=f"{name} (%)")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.tick_params(labelleft=True)
    axes.set_ylim(bottom=0)  # of both
    legend(figure, lines)
    return figure


def curve_label(curve: list[System]) -> str:
    """ "BERT" of "BERT, 250 questions" and "BERT, 1,000 questions"; of names that the user gave, the first and the last."""
    labels = [system.label.replace(f", {counted(system.size, 'question')}", "") for system in curve]
    return labels[0] if len(set(labels)) == 1 else f"{labels[0]} … {labels[-1]}"


def loss_curves(systems: list[System], questions: list[Question] | None) -> Figure:
    logs = {id(system): [log for run in system.evaluations if (log := run.log())] for system in systems}
    found = [system for system in systems if logs[id(system)]]
    if not found:
        raise Missing("A loss curve needs the log.jsonl of a run; no evaluation here is of a run that has one.")
    kinds = list(dict.fromkeys(system.identity["kind"] for system in found))
    figure = Figure((7.2, 3.4))
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for system in found:
            for log in logs[id(system)] if system.identity["kind"] == kind else ():
                draw(axes, *np.array([(event["step"], event["loss"]) for event in log], dtype=float).T, system)
        unit = "window" if kind == "bert" else "answer token"
        axes.set(title=FAMILIES[kind][0], xlabel="updates", ylabel=f"loss (nats per {unit})", xlim=(0, None), ylim=(0, None))
    legend(figure, {system.label: line(system) for system in found})
    return figure


def no_answer_thresholds(systems: list[System], questions: list[Question] | None) -> Figure:
    scored = [system for system in systems if np.isfinite(system.scores("no_answer_score")).any()]
    if not scored:
        raise Missing("The no-answer threshold is for v2.0; no evaluation here has no-answer scores.")
    if questions is None:
        raise Missing("The curve against the no-answer threshold needs the questions and their gold answers: give --data FILE.")
    figure = Figure((7.2, 3.4))
    panels = figure.subplots(1, 2, sharey=True)
    examples, drawn = [question.example for question in questions], {}
    for system, first in ((system, system.evaluations[0]) for system in scored):
        if (spans := best_spans(first)) is not None:
            answers = {question_id: text for question_id, (text, _) in spans.items()}  # before any refusal
            na_scores = dict(zip(first.titles, first.scores["no_answer_score"].tolist(), strict=True))
            thresholds, *sums = threshold_curves(examples, answers, na_scores, question_scores(examples, answers, True))
            for axes, total in zip(panels, sums, strict=True):
                draw(axes, thresholds, 100 * total / len(examples), system)
                axes.axvline(first.conditions.get("na_threshold") or 0, color=look(system)["color"], linewidth=1, linestyle=":")
            drawn[system.label] = line(system)
    if not drawn:
        raise Missing("The curve against the no-answer threshold needs nbest.json beside per_question.json; evaluate again.")
    for axes, name in zip(panels, FIGURES, strict=True):
        axes.set(xlabel="no-answer threshold", ylabel=f"{name} (%)")
    legend(figure, drawn)
    return figure


def confidences(systems: list[System], questions: list[Question] | None) -> Figure:
    known = [system for system in systems if np.isfinite(system.scores("confidence")).all()]
    if not known:
        raise Missing("This needs confidences; a file of predictions has none.")
    figure, looks = Figure((7.2, 3.7)), {}
    reliability, coverage = figure.subplots(1, 2)
    reliability.plot([0, 1], [0, 100], color=INK, linewidth=1, linestyle=":")
    for system in known:
        seeds = list(zip(system.scores("confidence"), system.scores("exact") > 0, strict=True))  # S pairs of [N], [N]
        confidence, right = (np.concatenate(parts) for parts in zip(*seeds, strict=True))  # [S N] each
        bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
        full = (count := np.bincount(bins)) > 0
        means = [np.bincount(bins, weights=values)[full] / count[full] for values in (confidence, 100 * right)]
        reliability.plot(*means, **line(system) | {"linewidth": 1})
        reliability.scatter(*means, s=4 + 60 * count[full] / count.max(), marker=look(system)["marker"], linewidths=0,
                            color=look(system)["color"], alpha=0.8, clip_on=False)
        answered = np.arange(1, len(seeds[0][0]) + 1)
        shares = [np.cumsum(right[np.argsort(-confidence, kind="stable")]) / answered for confidence, right in seeds]
        draw(coverage, 100 * answered / len(answered), 100 * np.mean(shares, axis=0), system)
        error, area = (np.mean([measure(*seed) for seed in seeds]) for measure in (calibration_error, coverage_area))
        looks[f"{system.label}: ECE {error:.3f}, area {area:.1f}"] = look(system)
    reliability.set(title="Reliability", xlabel="confidence (mean of each tenth)", ylabel="right answers (EM, %)", xlim=(0, 1),
                    ylim=(0, 100))
    coverage.set(title="Coverage", xlabel="answered, most confident first (%)", ylabel="right among them (EM, %)",
                 xlim=(0, 100), ylim=(0, 101))
    legend(figure, looks)
    return figure


def broken_down(systems: list[System], questions: list[Question] | None) -> Figure:
    if questions is None:
        raise Missing("Breakdowns need the questions, their passages and gold answers: give --data FILE.")
    tables = breakdowns(questions)
    sizes = [len(groups) for groups in tables.values()]
    heights = [1 + (0.2 + 0.05 * len(systems)) * max(pair) for pair in (sizes[:2], sizes[2:])]  # inches
    figure = Figure((7.2, sum(heights)))
    for axes, (title, groups) in zip(figure.subplots(2, 2, height_ratios=heights).flat, tables.items(), strict=True):
        for number, system in enumerate(systems):
            f1 = 100 * system.scores("f1").mean(axis=0)  # [N]
            shift = 0.7 * ((number + 0.5) / len(systems) - 0.5)  # so that no marker hides another one
            axes.plot([f1[rows].mean() for rows in groups.values()], np.arange(len(groups)) + shift,
                      **{**look(system), "linestyle": ""}, clip_on=False)
        axes.set_yticks(range(len(groups)), [f"{group} ({len(rows):,})" for group, rows in groups.items()])
        axes.set(title=title, xlabel="F1 (%)", xlim=(0, 100), ylim=(len(groups) - 0.5, -0.5))
    legend(figure, {system.label: {**look(system), "linestyle": ""} for system in systems})
    return figure


def legend(figure: Figure, looks: dict[str, dict]) -> None:
    """Below the plots, so that it hides nothing."""
    handles = [Line2D([], [], label=label, **look) for label, look in looks.items()]
    columns = max(1, min(len(looks), 110 // (max(map(len, looks)) + 8)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=3)


PLOTS = {  # name of the file: title, how to read it, the function
    "learning-curves": ("Learning curves", "A point is one seed; the line goes through the means. The band: 95% "
                        "intervals by article.", learning_curves),
    "loss": ("Training loss", "A line is one run. The losses of two families cannot be compared.", loss_curves),
    "no-answer-threshold": ("No-answer threshold (v2.0)", "A question with a no-answer score above it gets no answer. "
                            "Vertical: the threshold in use. The first seed of each system.", no_answer_thresholds),
    "confidences": ("Confidences", "Left: on the dotted line confidences mean what they say; below it they are too high. Large "
                    "markers are of many answers; ECE is how far off they are on average. Right: if only the most confident "
                    "questions are answered. The line of a system that knows when it is wrong begins high.", confidences),
    "breakdowns": ("Breakdowns", "Means over the seeds; in brackets the number of questions. A small group says little.",
                   broken_down),
}


def svg(name: str, systems: list[System], questions: list[Question] | None, for_page: bool) -> str:
    """A plot as SVG text. `for_page`: with ids that no other plot has, and text in the colour of the page's."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        buffer, nothing = io.StringIO(), {"Date": None, "Creator": None}
        PLOTS[name][2](systems, questions).savefig(buffer, format="svg", transparent=for_page, metadata=nothing)
    text = buffer.getvalue()
    if not for_page:
        return text
    text = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\1{name}-", text[text.index("<svg"):])
    return text.replace(INK.lower(), "currentColor")
