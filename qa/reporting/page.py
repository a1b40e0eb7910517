"""The report as one HTML page: tables, plots, and the questions where two systems differ. It loads nothing from elsewhere.

Every text that comes from a file goes through `escape`. Used by: qa/report.py.
"""

from __future__ import annotations

from html import escape

import numpy as np

from qa.data.squad import counted
from qa.reporting import plots
from qa.reporting.questions import Question, answer_span, best_spans, segments
from qa.reporting.systems import System
from qa.reporting.table import Rows, caution, difference_rows, system_rows

MARKS = ("first", "second")  # the classes of two systems' answers in a passage
MOST_SHOWN = 50  # questions where two systems differ
SIGNS = dict(zip(plots.MARKERS, "●■◆▲▼", strict=True))
CSS = """
:root { color-scheme: light dark; --ink: #1b2733; --soft: #5b6875; --line: #d8dee4; --page: #fff; --gold: #ffe9a8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ed; --soft: #9aa7b3; --line: #38424c; --page: #14191e; --gold: #6b5410; }
  svg, .swatch { filter: brightness(1.4); } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 78rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; }
p, figcaption { max-width: 44rem; } .soft, figcaption { color: var(--soft); font-size: .875rem; margin: .25rem 0 .75rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; line-height: 1.25; }
td:first-child, th:first-child, .left { text-align: left; } td.left:last-child { white-space: normal; min-width: 11rem; }
.swatch { display: inline-block; width: 1.25em; }
figure { margin: .5rem 0 0; } figure svg { display: block; width: 100%; max-width: 52rem; height: auto; }
.none { border-left: 3px solid var(--line); padding-left: .75rem; color: var(--soft); }
article { border-top: 1px solid var(--line); padding: 1rem 0; }
article h3 { font-size: 1rem; margin: 0 0 .4rem; max-width: 44rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .75rem; margin: 0 0 .5rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.passage { max-width: 44rem; margin: 0; font-size: .9375rem; line-height: 1.9; overflow-wrap: anywhere; white-space: pre-line; }
.gold { background: var(--gold) padding-box; } .first { box-shadow: inset 0 -2px var(--one); }
.second { border-bottom: 3px dotted var(--two); }
"""


def page(systems: list[System], questions: list[Question] | None, sources: list[str]) -> str:
    first = systems[0].evaluations[0]
    data, num_runs = str(first.conditions.get("data", "")), sum(len(system.evaluations) for system in systems)
    looks, notes = {system.label: plots.look(system) for system in systems}, caution(systems)
    parts = [f"<h1>Extractive question answering: {counted(len(systems), 'system')}</h1>",
             f'<p class="soft">{counted(num_runs, "evaluation")} on the same {counted(len(first.titles), "question")}'
             f"{' of ' + escape(data) if data else ''}{', a sample' if first.conditions.get('sample') else ''}</p>",
             "<h2>Systems</h2>", table(system_rows(systems), looks, left=("System", "Recipe")),
             f'<p class="soft">EM and F1 in percent; of seeds the mean ± standard deviation. {notes[0]}</p>']
    if len(systems) > 1:
        parts += ["<h2>Differences</h2>", table(difference_rows(systems), looks, left=("System", "minus")),
                  f'<p class="soft">In points. {" ".join(notes[1:])}</p>']
    for name, (title, reading, _) in plots.PLOTS.items():
        parts.append(f'<h2>{title}</h2>\n<figure id="{name}">')
        try:
            parts.append(f"{plots.svg(name, systems, questions, for_page=True)}<figcaption>{reading}</figcaption></figure>")
        except plots.Missing as reason:
            parts.append(f'<p class="none">{reason}</p></figure>')
    parts += ['<h2>Where two systems differ</h2>\n<section id="differ">', differing(systems, questions), "</section>",
              f'<p class="soft">Made by python -m qa.report from {escape(", ".join(sources))}.</p>']
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>Question answering: report</title><style>{CSS}</style></head>\n<body>\n" + "\n".join(parts)
            + "\n</body></html>\n")


def table(rows: Rows, looks: dict[str, dict], left: tuple[str, ...]) -> str:
    """looks: of the systems, by their labels, which get the sign of their plots; left: the names of the columns of texts."""
    def cell(tag: str, column: str, text: str) -> str:
        sign = f'<span class="swatch" style="color:{looks[text]["color"]}">{SIGNS[looks[text]["marker"]]}</span>' if (
            column in left and text in looks) else ""
        return f"<{tag}{' class=left' if column in left else ''}>{sign}{escape(text)}</{tag}>"

    lines = ["<tr>" + "".join(cell("td" if number else "th", *pair) for pair in zip(rows[0], row, strict=True)) + "</tr>"
             for number, row in enumerate(rows)]
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def differing(systems: list[System], questions: list[Question] | None) -> str:
    """For two systems (their first seeds) or two seeds: where one is better, the largest difference in F1 first."""
    runs = {system.label: system.evaluations[0] for system in systems} if len(systems) > 1 else {
        f"seed {run.options.get('seed', number)}": run for number, run in enumerate(systems[0].evaluations)}
    if len(runs) != 2:
        return f'<p class="none">This is for exactly two systems, or two seeds of one, not for {len(runs)}.</p>'
    if questions is None:
        return '<p class="none">This needs the questions and their passages: give --data FILE.</p>'
    f1, exact = (np.stack([run.scores[name] for run in runs.values()]) for name in ("f1", "exact"))  # [2, N] each
    differ = np.flatnonzero((f1[0] != f1[1]) | (exact[0] != exact[1]))
    rows = differ[np.argsort(-abs(f1[0] - f1[1])[differ], kind="stable")].tolist()
    best = [best_spans(run) or {} for run in runs.values()]
    names = [f'<span class="{mark}">{escape(label)}</span>' for mark, label in zip(MARKS, runs, strict=True)]
    shown = f", of which {MOST_SHOWN} are shown" if len(rows) > MOST_SHOWN else ""
    one, two = (plots.look(systems[number])["color"] for number in (0, -1))
    parts = [f'<p class="soft">{counted(len(rows), "question")} of {f1.shape[1]:,}{shown}, the largest difference first. '
             f'Marked: <span class="gold">gold answers</span>, {names[0]}, {names[1]}.</p>']
    for row in rows[:MOST_SHOWN]:
        answers = [(label, run.answers[row], spans.get(questions[row].example.id, ("", None)), run.scores["f1"][row])
                   for (label, run), spans in zip(runs.items(), best, strict=True)]
        parts.append(compared(questions[row], answers))
    return f'<div style="--one:{one};--two:{two}">' + "\n".join(parts) + "</div>"


def compared(question: Question, answers: list[tuple[str, str | None, tuple[str, int | None], float]]) -> str:
    """A question with its passage and the answers of two systems: (label, answer, best span, F1) of each."""
    passage, example = question
    marks = {"gold": [(answer.start_char, answer.end_char) for answer in example.answers]}
    lines = [("gold", "Gold", " | ".join(dict.fromkeys(example.gold_texts)) or "(no answer)")]
    for mark, (label, answer, best, f1) in zip(MARKS, answers, strict=True):
        marks[mark] = [span] if (span := answer_span(question, answer, best)) else []
        lines.append((mark, label, f"{answer or '(no answer)'}   (F1 {100 * f1:.0f})"))
    facts = "".join(f'<dt><span class="{mark}">{escape(name)}</span></dt><dd>{escape(text)}</dd>' for mark, name, text in lines)
    text = "".join(f'<span class="{" ".join(on)}">{escape(part)}</span>' if on else escape(part)
                   for part, on in segments(passage, marks))
    return (f'<article id="q-{escape(example.id)}"><h3>{escape(example.question)}</h3><dl>{facts}</dl>'
            f'<p class="passage">{text}</p></article>')
