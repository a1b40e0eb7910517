"""The report: its figures are those of independent computations, what comes from files stays text, what is missing is said.

One worked case. Seeds 0 and 1 answer 2 and 4 of 4 questions: EM (50 + 100) / 2 = 75.0, and the standard deviation of 50 and 100
is 35.4, so the table says "75.0 ± 35.4".
"""

from __future__ import annotations

import html
import itertools
import json
import math
import random
import re
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from qa import report
from qa.data.squad import Answer, Example, load_squad
from qa.reporting import page, plots, questions
from qa.reporting.systems import read_systems
from qa.reporting.table import difference_rows, markdown, recipe, system_rows

from .conftest import SCRIPT, assert_marked, make_run, marked_passages, run_report

T_5 = 2.570582  # Student's t, 97.5%, 5 degrees of freedom: from a printed table


def column(rows: list[list[str]], name: str) -> list[str]:
    return [row[rows[0].index(name)] for row in rows[1:]]


def scores_of(run: Path, key: str) -> dict[str, float]:
    entries = json.loads((run / "evaluation/per_question.json").read_text())
    return {question_id: entry[key] for question_id, entry in entries.items()}


def write_scores(folder: Path, exact: dict[str, list[int]]) -> Path:
    """An evaluation of a file of predictions: title -> EM of each of its questions."""
    folder.mkdir(parents=True)
    entries = {f"{title}-{number}": {"title": title, "exact": float(value), "f1": float(value), "prediction": "x",
                                     "confidence": None, "no_answer_score": None}
               for title, values in exact.items() for number, value in enumerate(values)}
    (folder / "per_question.json").write_text(json.dumps(entries))
    return folder


# ---- systems ----------------------------------------------------------------------------------------------------

def test_runs_that_differ_in_the_seed_alone_are_a_system_and_sizes_make_a_curve(runs):
    systems, warnings = read_systems(tuple(map(str, runs.values())))
    assert [(system.label, len(system.evaluations), system.size, system.curve) for system in systems] == [
        ("BERT, 10 questions", 3, 10, 0), ("BERT, 20 questions", 1, 20, 0), ("LoRA", 2, 10, 1)]
    assert warnings == [] and plots.look(systems[0])["marker"] != plots.look(systems[1])["marker"]


def test_options_tell_systems_of_one_size_apart(tmp_path, small_squad_file):
    for lr in (1e-4, 2e-4):
        make_run(tmp_path / f"lr{lr}", small_squad_file, size=10, lr=lr)
    systems, _ = read_systems((str(tmp_path / "lr0.0001"), str(tmp_path / "lr0.0002")))
    assert [system.label for system in systems] == ["BERT, lr 0.0001", "BERT, lr 0.0002"]
    assert plots.look(systems[0])["color"] != plots.look(systems[1])["color"]


def test_a_system_has_the_name_that_the_user_gives_it(runs, tmp_path):
    named = (f"long={runs['bert-10-0']}", str(runs["bert-10-1"]), f"a=b={runs['lora-10-0']}", f"long={runs['bert-10-2']}")
    systems, _ = read_systems(named)
    assert {(system.label, len(system.evaluations)) for system in systems} == {("long", 2), ("BERT", 1), ("a=b", 1)}
    (tmp_path / "lr=1").symlink_to(runs["bert-10-0"])
    assert read_systems((str(tmp_path / "lr=1"),))[0][0].label == "BERT"  # a folder of that name comes first


def test_an_evaluation_elsewhere_finds_its_run(runs, tmp_path):
    (runs["bert-10-1"] / "evaluation").rename(tmp_path / "elsewhere")
    systems, _ = read_systems((str(runs["bert-10-0"]), str(tmp_path / "elsewhere")))
    assert len(systems) == 1 and [run.options["seed"] for run in systems[0].evaluations] == [0, 1]


def test_facts_of_a_run(runs):
    systems, _ = read_systems((str(runs["bert-10-0"]), str(runs["bert-10-1"])))
    row = dict(zip(*system_rows(systems), strict=True))
    assert row["Trained parameters"] == "17" and row["Training questions"] == "10" and row["Speed"] == "6.0 windows/s"
    assert row["Training time"] == "2.0 min" and row["Recipe"].endswith(", lr 3e-05, 2 epochs, batch 16")  # (90 + 150) / 2 s
    assert [event["step"] for event in systems[0].evaluations[0].log()] == [1, 2, 3]


def test_the_recipe_names_the_run_whose_product_was_trained_further(tmp_path, small_squad_file):
    run = make_run(tmp_path / "more", small_squad_file, model="runs/first/model")
    assert recipe(read_systems((str(run),))[0][0]).startswith("first, lr ")


# ---- table ------------------------------------------------------------------------------------------------------

def test_worked_case(tmp_path, monkeypatch):
    folders = [write_scores(tmp_path / f"s{seed}", {"a": exact[:2], "b": exact[2:]})
               for seed, exact in enumerate(([1, 0, 1, 0], [1, 1, 1, 1]))]
    for folder in folders:
        (folder / "conditions.json").write_text(json.dumps({"predictions": "answers.json"}))
    systems, _ = read_systems(tuple(map(str, folders)))
    assert column(system_rows(systems), "EM") == ["75.0 ± 35.4"]


def test_figures_of_the_table_equal_independent_ones(runs):
    systems, _ = read_systems(tuple(map(str, runs.values())))
    rows = system_rows(systems)
    bert, large = ([runs[f"bert-10-{seed}"] for seed in range(3)], [runs["bert-20-0"]])
    for name, key in (("EM", "exact"), ("F1", "f1")):
        figures = [100 * statistics.fmean(scores_of(run, key).values()) for run in bert]
        assert column(rows, name)[0] == f"{statistics.fmean(figures):.1f} ± {statistics.stdev(figures):.1f}"
    articles: dict[str, list[float]] = {}
    entries = json.loads((large[0] / "evaluation/per_question.json").read_text())
    for entry in entries.values():
        articles.setdefault(entry["title"], []).append(100 * entry["exact"])
    means = [statistics.fmean(values) for values in articles.values()]  # 6 articles of 6 questions each
    half = T_5 * statistics.stdev(means) / math.sqrt(6)
    mean = statistics.fmean(means)
    assert column(rows, "95% interval")[1] == f"{max(mean - half, 0):.1f} to {mean + half:.1f}"


def test_differences_equal_independent_ones(runs):
    systems, _ = read_systems((str(runs["bert-20-0"]), str(runs["lora-10-0"])))
    rows = difference_rows(systems)
    one, other = (runs["bert-20-0" if label.startswith("BERT") else "lora-10-0"] for label in rows[1][:2])
    ours, theirs = scores_of(one, "exact"), scores_of(other, "exact")
    titles = {key: entry["title"] for key, entry in json.loads((one / "evaluation/per_question.json").read_text()).items()}
    sums = [sum(ours[key] - theirs[key] for key in titles if titles[key] == title) for title in dict.fromkeys(titles.values())]
    flipped = [abs(sum(sign * value for sign, value in zip(signs, sums, strict=True)))
               for signs in itertools.product((1, -1), repeat=len(sums))]
    p = statistics.fmean(value >= abs(sum(sums)) - 1e-9 for value in flipped)
    assert rows[1][2] == f"{100 * sum(sums) / 36:+.1f}".replace("-", "−") and rows[1][4] == f"{p:.3f}"
    assert scores_of(one, "f1").values() and statistics.fmean(scores_of(one, "f1").values()) >= statistics.fmean(
        scores_of(other, "f1").values())


def test_markdown_keeps_a_bar_in_a_name_inside_its_cell():
    assert markdown([["a|b", "c"], ["1\n2", "3"]]).splitlines() == ["| a\\|b | c |", "|---|---|", "| 1 2 | 3 |"]


# ---- questions --------------------------------------------------------------------------------------------------

def question(text: str, passage: str = "one two three", golds: tuple[str, ...] = ("two",)) -> questions.Question:
    return questions.Question(passage, Example("q", text, tuple(Answer(gold, passage.find(gold)) for gold in golds), golds,
                                               not golds, True))


@pytest.mark.parametrize("text, word", [
    ("Who built it?", "who"), ("In which year did the man who built it die?", "which"), ("How much is it?", "how many"),
    ("How did it end?", "how"), ("Name the whole island.", "other"), ("WHOSE is it?", "who")])
def test_question_word(text, word):
    assert questions.question_word(question(text)) == word


@pytest.mark.parametrize("golds, length, agreement", [
    (("a b", "The a b", "a b."), "2 words", "all agree"), (("x", "x", "y"), "1 word", "most agree"),
    (("x y z w", "y"), "4–5 words", "no majority"), (("1 2 3 4 5 6",), "6–10 words", "only one answer"),
    ((), "no answer", "no answer"), (("w " * 11,), "over 10 words", "only one answer")])
def test_answer_length_and_agreement(golds, length, agreement):
    asked = question("?", golds=golds)
    assert (questions.answer_length(asked), questions.agreement(asked)) == (length, agreement)


def test_breakdowns_have_every_question_once(small_squad_file):
    data = load_squad(str(small_squad_file))
    found = questions.find_questions([example.id for example in data.examples], data)
    for groups in questions.breakdowns(found).values():
        assert sorted(row for rows in groups.values() for row in rows) == list(range(36)) and all(groups.values())


def test_segments_mark_exactly_the_spans():
    draw = random.Random(0)
    for _ in range(60):
        passage = "".join(draw.choice("abc  ") for _ in range(draw.choice((5, 40, 1500))))
        marks = {name: [tuple(sorted(draw.sample(range(len(passage) + 1), 2))) for _ in range(draw.randint(0, 2))]
                 for name in "xyz"}
        assert_marked(questions.segments(passage, marks), passage, marks)


# ---- page -------------------------------------------------------------------------------------------------------

def test_page_of_two_runs_has_every_plot_and_no_text_becomes_code(two_v2_runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "page" / "report.html"
    assert run_report(monkeypatch, *two_v2_runs, "--out", out) == 0
    text = out.read_text()
    assert "<script" not in text.lower() and html.escape(SCRIPT) in text
    assert not re.search(r'(src|href)="(?!#)', text) and "url(http" not in text  # nothing from elsewhere
    drawn = {name: "<svg" in text.partition(f'<figure id="{name}">')[2].partition("</figure>")[0] for name in plots.PLOTS}
    assert [name for name, there in drawn.items() if not there] == ["learning-curves"]
    assert "A learning curve needs runs that differ in --max-train-questions" in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_marks_are_at_the_right_characters(two_v2_runs):
    systems, _ = read_systems(tuple(map(str, two_v2_runs)))
    first = systems[0].evaluations[0]
    data = load_squad(first.conditions["data"])
    text = page.differing(systems, questions.find_questions(list(first.titles), data))
    answers = [json.loads((run / "evaluation/per_question.json").read_text()) for run in two_v2_runs]
    best = [json.loads((run / "evaluation/nbest.json").read_text()) for run in two_v2_runs]
    shown = marked_passages(text)
    differ = {example.id for example in data.examples if answers[0][example.id]["f1"] != answers[1][example.id]["f1"]}
    assert shown.keys() == differ and len(differ) > 5
    for passage in data.passages:
        for example in passage.examples:
            if example.id in differ:
                spans = {"gold": [(gold.start_char, gold.end_char) for gold in example.answers]}
                for name, system, entries in zip(("first", "second"), answers, best, strict=True):
                    found = [entry for entry in entries[example.id] if entry["text"] == system[example.id]["prediction"] != ""]
                    spans[name] = [(entry["start_char"], entry["end_char"]) for entry in found]
                assert_marked(shown[example.id], passage.text, spans)


def test_two_seeds_of_a_system_are_compared_too(runs, small_squad_file):
    systems, _ = read_systems((str(runs["bert-10-0"]), str(runs["bert-10-1"])))
    found = questions.find_questions(list(systems[0].evaluations[0].titles), load_squad(str(small_squad_file)))
    text = page.differing(systems, found)
    assert marked_passages(text) and "seed 0" in text and "seed 1" in text
    assert "exactly two" in page.differing(read_systems(tuple(map(str, runs.values())))[0], found)


def test_page_says_what_is_missing(tmp_path, monkeypatch):
    folders = [write_scores(tmp_path / name, {"a": [1, 0], "b": [0, number]}) for number, name in enumerate(("x", "y"))]
    out = tmp_path / "report.html"
    assert run_report(monkeypatch, *folders, "--out", out) == 0
    text = out.read_text()
    assert "<svg" not in text and len(re.findall('<p class="none">', text)) == len(plots.PLOTS) + 1
    assert text.count("give --data FILE") == 2 and "a file of predictions has none" in text


def test_a_system_has_one_colour_everywhere(runs, tmp_path, monkeypatch, small_squad_file):
    out = tmp_path / "figures"
    assert run_report(monkeypatch, *runs.values(), "--figures", out, "--data", small_squad_file) == 0
    names = {path.stem for path in out.iterdir()}
    assert names == set(plots.PLOTS) - {"no-answer-threshold"}
    for path in out.iterdir():
        colours = set(re.findall(r"(?:stroke|fill): (#[0-9a-f]{6})", path.read_text())) - {plots.INK.lower(), "#ffffff"}
        assert colours == {colour.lower() for colour in plots.COLOURS[:2]}, path.name


def test_same_input_gives_the_same_plot(runs):
    systems, _ = read_systems(tuple(map(str, runs.values())))
    assert plots.svg("loss", systems, None, for_page=True) == plots.svg("loss", systems, None, for_page=True)


def test_threshold_curve_passes_through_the_official_figure(two_v2_runs, monkeypatch):
    """At the threshold that was used, the curve has the EM of per_question.json."""
    drawn = []
    monkeypatch.setattr(plots, "draw", lambda axes, x, y, system: drawn.append((x, y)))
    systems, _ = read_systems((str(two_v2_runs[0]),))
    first = systems[0].evaluations[0]
    found = questions.find_questions(list(first.titles), load_squad(first.conditions["data"]))
    plots.no_answer_thresholds(systems, found)
    for (thresholds, figures), key in zip(drawn, ("exact", "f1"), strict=True):
        assert figures[np.searchsorted(thresholds, 0.0, side="right") - 1] == pytest.approx(100 * first.scores[key].mean())


# ---- bad input --------------------------------------------------------------------------------------------------

def test_matplotlib_is_imported_by_the_plots_alone_and_missing_it_is_one_line(runs, tmp_path, monkeypatch, capsys):
    files = [path for path in Path(report.__file__).parent.rglob("*.py")
             if re.search(r"^\s*(import|from) matplotlib", path.read_text(), re.MULTILINE)]
    assert [path.name for path in files] == ["plots.py"]
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("plots", "page"):
        monkeypatch.delitem(sys.modules, f"qa.reporting.{name}")
        monkeypatch.delattr(f"qa.reporting.{name}")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_report(monkeypatch, runs["bert-10-0"], "--out", tmp_path / "x.html") == 2
    assert "pip install -r requirements-report.txt" in capsys.readouterr().err
    assert run_report(monkeypatch, runs["bert-10-0"], "--markdown") == 0
    assert "| BERT | 1 |" in capsys.readouterr().out


BAD = {
    "no evaluation there": lambda runs, tmp: [tmp],
    "no such folder": lambda runs, tmp: [runs["bert-10-0"], tmp / "typo"],
    "are of the same training": lambda runs, tmp: [runs["bert-10-0"], shutil.copytree(runs["bert-10-0"], tmp / "copy")],
    "has two names, 'a' and 'b'": lambda runs, tmp: [f"a={runs['bert-10-0']}", f"b={runs['bert-10-0']}"],
    "of a folder of runs give": lambda runs, tmp: [runs["bert-10-0"].parent],
    "loss is missing": lambda runs, tmp: [spoil(runs["bert-10-0"], '"loss"', '"lost"', "log.jsonl")],
    "is a folder; expected the name": lambda runs, tmp: [runs["bert-10-0"], "--markdown", "--out", runs["bert-10-0"]],
    "error: --figures": lambda runs, tmp: [runs["bert-10-0"], "--markdown", "--figures", runs["bert-10-0"] / "options.json"],
    "/typo: no such folder": lambda runs, tmp: [f"BERT={tmp}/typo"],
    "nothing to report": lambda runs, tmp: [],
    "nothing to make": lambda runs, tmp: [runs["bert-10-0"]],
    "cannot be read": lambda runs, tmp: [runs["bert-10-0"], "--markdown", "--data", tmp / "no.json"],
    "lacks 36 of the 36 questions": lambda runs, tmp: [runs["bert-10-0"], "--markdown", "--data", "demo"],
    "exact is 2.0; expected a number from 0 to 1": lambda runs, tmp: [spoil(runs["bert-10-0"], '"exact": 1.0', '"exact": 2.0')],
    "not JSON": lambda runs, tmp: [spoil(runs["bert-10-0"], "{", "{{")],
    "the same questions for all": lambda runs, tmp: [runs["bert-10-0"], write_scores(tmp / "other", {"a": [1]})],
    "kind is 'bart'": lambda runs, tmp: [spoil(runs["bert-10-0"], '"bert"', '"bart"', "options.json")],
}


def spoil(run: Path, old: str, new: str, name: str = "evaluation/per_question.json") -> Path:
    path = run / name
    path.write_text(path.read_text().replace(old, new))
    return run


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(message, runs, tmp_path, monkeypatch, capsys):
    argv = BAD[message](runs, tmp_path)
    argv += [] if message == "nothing to make" or "--markdown" in argv else ["--markdown"]
    assert run_report(monkeypatch, *argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")


def test_a_run_that_is_not_evaluated_is_left_out_with_a_warning(runs, tmp_path, monkeypatch, capsys):
    (runs["bert-10-1"] / "evaluation/per_question.json").unlink()
    assert run_report(monkeypatch, runs["bert-10-0"], runs["bert-10-1"], "--markdown") == 0
    shown = capsys.readouterr()
    assert "warning: " in shown.err and str(runs["bert-10-1"]) in shown.err and "| BERT | 1 |" in shown.out
