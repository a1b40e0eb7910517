"""The report in a real browser: Chromium without a window, which prints the page as it understood it, and what went wrong.

One worked case. A passage says "<script>document.title='pwned'</script>". As text it leaves the title alone; as code it would
change it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qa.data.squad import load_squad
from qa.reporting import plots

from .conftest import assert_marked, marked_passages, run_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]
MEASURE = """<script>
const boxes = [...document.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect());
document.body.dataset.heights = JSON.stringify(boxes.map(box => box.height));
document.body.dataset.overflow = document.documentElement.scrollWidth - window.innerWidth;
</script>"""


def browse(path: Path, width: int) -> tuple[str, list[str]]:
    """The page's elements once it is loaded, and the lines of the browser's console."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
               f"--window-size={width},2000", f"--user-data-dir={path.parent / 'profile'}", path.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return ended.stdout, [line for line in ended.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture
def report(two_v2_runs, tmp_path, monkeypatch) -> Path:
    out = tmp_path / "report.html"
    assert run_report(monkeypatch, *two_v2_runs, "--out", out) == 0
    return out


def test_page_in_a_browser(report, two_v2_runs):
    dom, console = browse(report, 1280)
    assert console == []
    assert "<title>Question answering: report</title>" in dom and "<script" not in dom.lower()
    figures = {name: figure for name, figure in re.findall(r'<figure id="([^"]+)">(.*?)</figure>', dom, re.DOTALL)}
    assert figures.keys() == plots.PLOTS.keys()
    assert [name for name, figure in figures.items() if "<svg" not in figure] == ["learning-curves"]  # there is no curve
    folders = [run / "evaluation" for run in two_v2_runs]
    data = load_squad(json.loads((folders[0] / "conditions.json").read_text())["data"])
    answers = [json.loads((folder / "predictions.json").read_text()) for folder in folders]
    best = [json.loads((folder / "nbest.json").read_text()) for folder in folders]
    shown = marked_passages(dom)
    assert len(shown) > 5
    for passage in data.passages:
        for example in (example for example in passage.examples if example.id in shown):
            spans = {"gold": [(gold.start_char, gold.end_char) for gold in example.answers]}
            for name, texts, entries in zip(("first", "second"), answers, best, strict=True):
                spans[name] = [(entry["start_char"], entry["end_char"]) for entry in entries[example.id]
                               if entry["text"] == texts[example.id] != ""]
            assert_marked(shown[example.id], passage.text, spans)


@pytest.mark.parametrize("width", [600, 1280])
def test_plots_have_a_size_and_the_page_fits_the_window(report, width):
    report.write_text(report.read_text().replace("</body>", MEASURE + "</body>"))
    dom, console = browse(report, width)
    heights = json.loads(re.search(r'data-heights="([^"]*)"', dom)[1])
    assert console == [] and len(heights) == len(plots.PLOTS) - 1 and min(heights) > 100
    assert int(re.search(r'data-overflow="(-?\d+)"', dom)[1]) <= 0
