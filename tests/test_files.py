"""Files and folders: written whole, verified, replaced.

One worked case: {"a": 1} is written as the 12 bytes of '{\\n "a": 1\\n}\\n'.
"""

from __future__ import annotations

import json

import pytest

from qa.errors import UserError
from qa.files import check_out, damages, finish_replacing, read_manifest, replace_folder, seal, write_json


def test_worked_case(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").read_bytes() == b'{\n "a": 1\n}\n' and len(b'{\n "a": 1\n}\n') == 12


def test_write_json_replaces_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"é": [1, 2]})
    assert path.read_bytes() == '{\n "é": [\n  1,\n  2\n ]\n}\n'.encode()
    for bad in (float("nan"), {1, 2}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, bad)
    assert json.loads(path.read_bytes()) == {"é": [1, 2]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("damage, words", [
    (lambda folder: (folder / "a.json").write_bytes(b"[2]"), "damaged, its SHA-256 is not the one"),
    (lambda folder: (folder / "a.json").write_bytes(b"[1] "), "has 4 bytes, expected 3"),
    (lambda folder: (folder / "a.json").unlink(), "cannot be read"),
    (lambda folder: (folder / "b.json").write_bytes(b"[1]"), "no part of what was saved"),
    (lambda folder: (folder / "manifest.json").unlink(), "missing or damaged")])
def test_a_sealed_folder_shows_every_damage(damage, words, tmp_path):
    (tmp_path / "a.json").write_bytes(b"[1]")
    seal(tmp_path, 7, run="x")
    assert damages(tmp_path) == [] and (read_manifest(tmp_path)["step"], read_manifest(tmp_path)["run"]) == (7, "x")
    damage(tmp_path)
    (line,) = damages(tmp_path)
    assert words in line and str(tmp_path) in line


@pytest.mark.parametrize("instant", ["before", "between", "after"])
def test_a_folder_is_old_or_new_whenever_the_replacing_is_killed(instant, tmp_path):
    new, folder, aside = tmp_path / "new", tmp_path / "x", tmp_path / ".x.old"
    for path, text in ((new, "new"), (folder, "old")):
        path.mkdir()
        (path / "text").write_text(text)
    if instant == "between":  # the two renames
        folder.rename(aside)
    elif instant == "after":
        replace_folder(new, folder)
        aside.mkdir()  # not deleted yet
    finish_replacing(folder)
    assert (folder / "text").read_text() == ("new" if instant == "after" else "old") and not aside.exists()


def test_out_is_a_folder_that_may_be_written_or_a_new_name(tmp_path):
    (tmp_path / "file").write_text("")
    check_out(tmp_path)
    check_out(tmp_path / "new" / "er")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="^--out .*file is a file; expected a folder or a new name$"):
            check_out(path)
