"""Errors of models, tuning and data sets know a key of the recipe at most; here they get its file and line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from triptych.core.config import ConfigTree, KeyPath
from triptych.core.errors import Problem, TriptychError


@contextmanager
def at_key(key: str) -> Iterator[None]:
    """Give problems raised inside, where they name neither file nor key, this key of the recipe."""
    try:
        yield
    except TriptychError as error:
        unplaced = [item if item.file or item.key else replace(item, key=key) for item in error.problems]
        raise type(error)(unplaced) from error


@contextmanager
def in_recipe(tree: ConfigTree) -> Iterator[None]:
    """Give problems raised inside, where they name a key and no file, the key's file and line."""
    try:
        yield
    except TriptychError as error:
        raise type(error)([_placed(item, tree) for item in error.problems]) from error


def _placed(problem: Problem, tree: ConfigTree) -> Problem:
    if problem.file is not None or problem.key is None:
        return problem
    key: KeyPath = tuple(int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", problem.key))
    file, line = tree.locate(key)
    return replace(problem, file=file, line=line)
