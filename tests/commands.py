"""Running `triptych` commands inside the test process, and tiny recipes to run."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from triptych import cli
from triptych.core.config import load_tree, validate
from triptych.stages.pipeline import find_stage
from triptych.stages.table import STAGES

FP32 = "train.runtime.precision=fp32"
"""Argument of runs whose numbers are compared closer than bf16 allows, which `auto` takes where processors have it."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str


def triptych(*arguments: object, typed: str = "") -> Outcome:
    """Run a command; exceptions that are not meant for the user come through.

    Args:
        arguments: what follows `triptych`.
        typed: standard input.
    """
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with (
        mock.patch.object(sys, "argv", ["triptych", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", io.StringIO(typed)),
        mock.patch.dict(os.environ, {"COLUMNS": "160"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
    return Outcome(status, out.getvalue(), err.getvalue())


def write(file: Path, values: dict[str, Any], **changes: Any) -> Path:
    """Write a recipe as YAML; `train={"save_every": 1}` is merged one level deep."""
    merged = dict(values)
    for key, value in changes.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(merged, sort_keys=False))
    return file


def read_recipe(file: Path, *overrides: str) -> Any:
    """The validated recipe of a file."""
    tree = load_tree(file, overrides)
    schema, _ = STAGES[find_stage(tree)]
    return validate(schema, tree)
