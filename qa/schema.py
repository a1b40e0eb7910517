"""What the JSON files that we read may hold: a table for each file, checked once, where it is read.

    SCHEMA = {"hidden_size": whole(1), "hidden_act": TEXT, "is_v2": optional(FLAG)}
    config = read_object("config.json", "a model's configuration", SCHEMA)

A field without `optional` must be there. Fields that the table does not name are not looked at. The tables stand beside the
code that needs the values: weights.py, settings.py, llama/adapter.py, llama/prompt.py, training/run.py,
reporting/systems.py.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from qa.errors import UserError
from qa.files import read_json


class Rule(NamedTuple):
    words: str  # after "expected"
    holds: Callable[[Any], bool]


TEXT = Rule("a text", lambda value: isinstance(value, str))
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))


def whole(low: int, high: int = 2**31 - 1) -> Rule:
    return Rule(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float = 1e38) -> Rule:
    return Rule(f"a number from {low:g} to {high:g}", lambda value: type(value) in (int, float) and low <= value <= high)


def one_of(*values: Any) -> Rule:
    return Rule(f"one of {', '.join(map(repr, values))}", lambda value: type(value) is type(values[0]) and value in values)


def list_of(rule: Rule) -> Rule:
    return Rule(f"a list, each of it {rule.words}", lambda value: isinstance(value, list) and all(map(rule.holds, value)))


def object_of(rule: Rule) -> Rule:
    return Rule(f"an object, each value of it {rule.words}",
                lambda value: isinstance(value, dict) and all(map(rule.holds, value.values())))


def either(one: Rule, other: Rule) -> Rule:
    return Rule(f"{one.words}, or {other.words}", lambda value: one.holds(value) or other.holds(value))


def optional(rule: Rule) -> Rule:
    return Rule(f"{rule.words}, or null", lambda value: value is None or rule.holds(value))


def read_object(path: Path | str, expected: str, schema: dict[str, Rule]) -> dict[str, Any]:
    """The JSON object in a file. What it may not hold is a UserError that names file and field."""
    content = read_json(path, expected)
    check_fields(content, path, schema)
    return content


def check_fields(content: Any, source: Path | str, schema: dict[str, Rule]) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{source}: holds no JSON object but a {type(content).__name__}; copy it again")
    for name, rule in schema.items():
        if not rule.holds(value := content.get(name)):
            found = reprlib.repr(value) if name in content else "missing"
            raise UserError(f"{source}: {name} is {found}; expected {rule.words}")
