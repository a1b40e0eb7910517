"""Evaluations side by side, on one page that needs nothing else: tables, plots, questions where two systems differ.

    python -m qa.report runs/* --out report.html                               # runs with a folder evaluation/
    python -m qa.report eval-a eval-b --data dev-v1.1.json --out report.html   # folders that evaluate.py wrote
    python -m qa.report runs/* --markdown                                      # prints the tables
    python -m qa.report runs/* --figures figures                               # the plots as SVG files

Runs whose options are the same except the seed are one system. All evaluations must be of the same questions. The plots need
matplotlib: pip install -r requirements-report.txt.

    folders -> reporting/systems.py -> table.py, plots.py, questions.py -> page.py -> report.html
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

from qa.data.squad import DEMO_NAMES, load_squad
from qa.errors import UserError, exit_status
from qa.files import check_out, write_bytes, writing
from qa.options import ReportOptions, parse
from qa.reporting.questions import Question, find_questions
from qa.reporting.systems import System, read_systems
from qa.reporting.table import caution, difference_rows, markdown, system_rows


def main() -> None:
    options, _ = parse(ReportOptions, __doc__)
    if not (options.out or options.figures or options.markdown):
        raise UserError("nothing to make: give --out report.html, --figures FOLDER or --markdown")
    page, plots = import_page() if options.out or options.figures else (None, None)
    for path in filter(None, (options.figures, options.out and Path(options.out).parent)):
        check_out(path)
    systems, warnings = read_systems(options.folders)
    questions = read_questions(options.data, systems)
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    if options.out:
        write(Path(options.out), page.page(systems, questions, list(options.folders)))
    if options.figures:
        for name in plots.PLOTS:
            try:
                write(Path(options.figures) / f"{name}.svg", plots.svg(name, systems, questions, for_page=False))
            except plots.Missing as reason:
                print(f"no {name}.svg: {reason}")
    if options.markdown:
        print(markdown(system_rows(systems)), caution(systems[0]), sep="\n\n")
        if len(systems) > 1:
            print("", markdown(difference_rows(systems)), sep="\n")


def import_page() -> tuple[ModuleType, ModuleType]:
    """page.py and plots.py, which need matplotlib."""
    try:
        from qa.reporting import page, plots
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing, which draws the plots: pip install -r requirements-report.txt; or give "
                        "--markdown alone, which needs no plots") from None
    return page, plots


def read_questions(data: str | None, systems: list[System]) -> list[Question] | None:
    """--data; without it the data that the first evaluation names, if that is a file here or built in."""
    evaluation = systems[0].evaluations[0]
    named = evaluation.conditions.get("data")
    if data is None and isinstance(named, str) and (named in DEMO_NAMES or Path(named).is_file()):
        data = named
    return find_questions(list(evaluation.titles), load_squad(data, "dev")) if data else None


def write(path: Path, text: str) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, text.encode("utf-8", "backslashreplace"))
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
