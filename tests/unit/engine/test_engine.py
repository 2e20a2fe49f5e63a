"""Every key that an error of the engine names exists in a recipe."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import triptych.engine
from triptych.stages.recipe import StageRecipe

SCHEMA = StageRecipe.model_json_schema()


def named_keys() -> list[tuple[str, str]]:
    """(place, key) of every `key=` of a call in the engine."""
    folder = Path(triptych.engine.__file__).parent
    return [
        (f"{path.name}:{call.lineno}", str(ast.literal_eval(keyword.value)))
        for path in sorted(folder.rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        for keyword in call.keywords
        if keyword.arg == "key" and call.func.id.endswith(("Problem", "Error"))
    ]


def exists(key: str) -> bool:
    return _descend(SCHEMA, key.split("."))


def _descend(schema: dict[str, Any], parts: list[str]) -> bool:
    if "$ref" in schema:
        return _descend(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], parts)
    if not parts:
        return True
    properties = schema.get("properties", {})
    if parts[0] in properties:
        return _descend(properties[parts[0]], parts[1:])
    return any(_descend(choice, parts) for choice in (*schema.get("anyOf", ()), *schema.get("oneOf", ())))


def test_the_schema_tells_keys_apart() -> None:
    assert exists("train.best.metric") and exists("train.schedule.warmup") and exists("tuning")
    assert not exists("train.precision") and not exists("schedule")


@pytest.mark.parametrize(("place", "key"), named_keys())
def test_every_key_named_exists(place: str, key: str) -> None:
    assert exists(key), f"{place} names `{key}`"
