"""Evaluations side by side, on one page that needs no other file: tables, plots, questions where two systems differ.

    python -m qa.report runs/* --out report.html                               # runs with a folder evaluation/
    python -m qa.report eval-a eval-b --data dev-v1.1.json --out report.html   # folders that evaluate.py wrote
    python -m qa.report runs/* --markdown                                      # prints the tables
    python -m qa.report runs/* --figures figures                               # the plots as SVG files
    python -m qa.report "BERT, long=runs/a" runs/b --out report.html           # one with a name of yours

Runs whose options are the same except the seed are one system. All evaluations must be of the same questions. The plots need
matplotlib: pip install -r requirements-report.txt.

    folders -> reporting/systems.py -> table.py, plots.py, questions.py -> page.py -> report.html
"""

from __future__ import annotations

import sys
from pathlib import Path

from qa.data.squad import DEMO_NAMES, load_squad
from qa.errors import UserError, exit_status
from qa.files import check_out, write_bytes, writing
from qa.flags import parse
from qa.options import ReportOptions
from qa.reporting.questions import Question, find_questions
from qa.reporting.systems import System, read_systems
from qa.reporting.table import caution, difference_rows, markdown, system_rows


def main() -> None:
    options, _ = parse(ReportOptions, __doc__)
    if not (options.out or options.figures or options.markdown):
        raise UserError("nothing to make: give --out report.html, --figures FOLDER or --markdown")
    if options.out or options.figures:
        try:
            from qa.reporting import page, plots
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name}, which draws the plots, is missing: pip install -r requirements-report.txt; or give "
                            "--markdown alone, which needs none") from None
    for name, path in (("--figures", options.figures), ("--out", options.out and Path(options.out).parent)):
        if path:
            check_out(path, name)
    if options.out and Path(options.out).is_dir():
        raise UserError(f"--out {options.out}: is a folder; expected the name of the page, such as {options.out}/report.html")
    systems, warnings = read_systems(options.folders)
    questions = read_questions(options.data, systems)
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    if options.out:
        write(Path(options.out), page.page(systems, questions, list(options.folders)))
    for name in plots.PLOTS if options.figures else ():
        try:
            write(Path(options.figures) / f"{name}.svg", plots.svg(name, systems, questions, for_page=False))
        except plots.Missing as reason:
            print(f"no {name}.svg: {reason}", file=sys.stderr)
    if options.markdown:
        tables = [markdown(rows) for rows in (system_rows(systems), difference_rows(systems)) if len(rows) > 1]
        print(*tables, " ".join(caution(systems)), sep="\n\n")


def read_questions(data: str | None, systems: list[System]) -> list[Question] | None:
    """Of --data; without it, of the data that the first evaluation names, if that is a file here or built in."""
    evaluation = systems[0].evaluations[0]
    named = str(evaluation.conditions.get("data"))
    data = data or (named if named in DEMO_NAMES or Path(named).is_file() else None)
    return find_questions(list(evaluation.titles), load_squad(data, "dev")) if data else None


def write(path: Path, text: str) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, text.encode("utf-8", "backslashreplace"))
    print(f"written to {path}", file=sys.stderr)  # stdout is for --markdown


if __name__ == "__main__":
    sys.exit(exit_status(main))
