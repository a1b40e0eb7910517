"""Who may import whom, written down once.

One worked case: `qa/bert/reader.py` has the line `from qa.training.precision import Precision`; the arrow is
("qa.bert", "qa.training"), and BELOW["qa.bert"] has "qa.training".
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room: a folder of qa/, or a file that is directly in it. Each imports from the rooms named, which are all above it here.
BELOW = {
    "qa.errors": set(),
    "qa.cpu": set(),
    "qa.files": {"qa.errors"},
    "qa.schema": {"qa.errors", "qa.files"},
    "qa.options": set(),
    "qa.flags": {"qa.errors", "qa.options"},
    "qa.families": {"qa.schema"},
    "qa.weights": {"qa.errors", "qa.families", "qa.schema"},
    "qa.data": {"qa.errors", "qa.files"},
    "qa.settings": {"qa.data", "qa.schema"},
    "qa.prediction": {"qa.data"},
    "qa.evaluation": {"qa.data", "qa.errors", "qa.files", "qa.prediction"},
    "qa.asking": {"qa.data", "qa.errors", "qa.evaluation", "qa.prediction", "qa.settings"},
    "qa.training": {"qa.cpu", "qa.data", "qa.errors", "qa.evaluation", "qa.files", "qa.options", "qa.prediction",
                    "qa.schema", "qa.settings"},
    "qa.bert": {"qa.asking", "qa.cpu", "qa.data", "qa.errors", "qa.families", "qa.prediction", "qa.settings", "qa.training",
                "qa.weights"},
    "qa.llama": {"qa.asking", "qa.data", "qa.errors", "qa.evaluation", "qa.files", "qa.prediction", "qa.schema",
                 "qa.settings", "qa.training", "qa.weights"},
    "qa.reader": {"qa.bert", "qa.data", "qa.errors", "qa.flags", "qa.llama", "qa.options", "qa.settings", "qa.training",
                  "qa.weights"},
    "qa.ask": {"qa.asking", "qa.data", "qa.errors", "qa.evaluation", "qa.flags", "qa.options", "qa.reader", "qa.training"},
    "qa.reporting": {"qa.data", "qa.errors", "qa.evaluation", "qa.files", "qa.options", "qa.schema"},
    "qa.report": {"qa.data", "qa.errors", "qa.files", "qa.flags", "qa.options", "qa.reporting"},
}


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imports(path: Path) -> set[str]:
    """The modules of qa that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qa":
            deeper = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= deeper if node.module == "qa" else {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "qa"}
    return found


def modules() -> dict[str, Path]:
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted((ROOT / "qa").rglob("*.py"))
            if path.name != "__init__.py"}


def test_worked_case():
    assert ("qa.bert", "qa.training") in {("qa.bert", room(name)) for name in imports(ROOT / "qa/bert/reader.py")}
    assert "qa.training" in BELOW["qa.bert"]


def test_every_room_is_in_the_list_and_imports_only_from_those_above_it():
    assert {room(name) for name in modules()} == BELOW.keys()
    names = list(BELOW)
    for number, name in enumerate(names):
        assert BELOW[name] <= set(names[:number]), f"{name}: an upward arrow in the list itself"


@pytest.mark.parametrize("name", modules())
def test_imports_run_downward_only(name):
    arrows = {room(imported) for imported in imports(modules()[name])} - {room(name)}
    assert arrows <= BELOW[room(name)], f"{name} imports from {sorted(arrows - BELOW[room(name)])}"


def test_no_cycle_between_files_of_a_folder():
    graph = {name: imports(path) & modules().keys() for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a cycle: {' -> '.join([*path, name])}"
        if name not in done:
            for imported in graph[name]:
                visit(imported, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def loaded_by(*names: str) -> set[str]:
    """What importing these files loads: the files of qa that they import, and so on."""
    graph, loaded, todo = {name: imports(path) for name, path in modules().items()}, set(), list(names)
    while todo:
        if (name := todo.pop()) not in loaded:
            loaded.add(name)
            todo += graph.get(name, ())
    return loaded


@pytest.mark.parametrize("family, other", [("qa.bert", "qa.llama"), ("qa.llama", "qa.bert")])
def test_a_family_loads_without_the_other(family, other):
    loaded = loaded_by(*(name for name in modules() if room(name) == family))
    assert not [name for name in loaded if room(name) == other] and "qa.data.squad" in loaded


def test_train_bert_does_not_load_llama():
    code = "import sys, train_bert; print([name for name in sys.modules if name.startswith('qa.llama')])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert not [name for name in loaded_by(*imports(ROOT / "train_bert.py")) if room(name) == "qa.llama"]
