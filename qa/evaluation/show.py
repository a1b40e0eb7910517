"""Results for a person at a terminal: a line of figures, a table, answers marked in their passages.

Used by: evaluate.py, training/evaluator.py, qa/ask.py (`mark`).
"""

from __future__ import annotations

import sys
import textwrap
from typing import Any

from qa.data.squad import SquadData, counted
from qa.evaluation.scoring import final_answers
from qa.prediction import Prediction

HIGHLIGHT = ("\033[1;32m", "\033[0m")


def metrics_line(metrics: dict[str, Any]) -> str:
    """ "EM 55.32, F1 66.90 (1,495 questions)", and the two parts of v2.0: questions with an answer and without."""
    exact = metrics.get("exact_match", metrics.get("exact"))
    line = f"EM {exact:.2f}, F1 {metrics['f1']:.2f} ({counted(metrics['total'], 'question')})"
    for part, words in (("HasAns", "with an answer"), ("NoAns", "without")):
        if f"{part}_exact" in metrics:
            exact, f1, total = (metrics[f"{part}_{figure}"] for figure in ("exact", "f1", "total"))
            line += f"; {words}: EM {exact:.2f}, F1 {f1:.2f} ({total:,})"
    if "raw_f1" in metrics:
        line += (f"; as generated: EM {metrics['raw_exact']:.2f}, F1 {metrics['raw_f1']:.2f}, "
                 f"{counted(metrics['num_exact'], 'text')} found in the passage as written")
    return line


def table(metrics: dict[str, Any]) -> str:
    """One line per figure, aligned."""
    width = max(map(len, metrics))
    return "\n".join(f"  {name:<{width}}  {value:>10.4f}" if isinstance(value, float) else f"  {name:<{width}}  {value:>10}"
                     for name, value in metrics.items())


def mark(text: str, start_char: int, end_char: int) -> str:
    """The text with a span of it marked: in colour at a terminal, else in brackets."""
    before, after = HIGHLIGHT if sys.stdout.isatty() else ("[[", "]]")
    return text[:start_char] + before + text[start_char:end_char] + after + text[end_char:]


def marked_passages(data: SquadData, predictions: list[Prediction], count: int, na_threshold: float | None) -> str:
    """`count` questions, each with its passage, in which the predicted span is marked.

    With gold answers they are evenly spread over the data; without, they are the first ones.
    """
    questions = [(passage.text, example) for passage in data.passages for example in passage.examples]
    answers, parts = final_answers(predictions, na_threshold), []
    for index in range(0, len(questions), max(1, len(questions) // count) if data.has_answers else 1)[:count]:
        (passage, example), prediction = questions[index], predictions[index]
        if answer := answers[example.id]:
            passage = mark(passage, prediction.candidates[0].start_char, prediction.candidates[0].end_char)
        gold = " | ".join(dict.fromkeys(example.gold_texts)) or "(no answer)"
        parts.append(f"\n  Q: {example.question}\n" + textwrap.fill(passage, 100, initial_indent="     ",
                     subsequent_indent="     ") + f"\n     answer: {answer or '(no answer)'}"
                     + (f"    gold: {gold}" if data.has_answers else ""))
    return "\n".join(parts) + "\n"
