"""Errors a user can act on: each names the thing, where it is, and the remedy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, where it is and what to do about it."""

    message: str
    """What is wrong, with the values that disagree."""
    file: str | None = None
    """File the problem was found in."""
    line: int | None = None
    """1-based line (text) or row (Parquet, tar) inside `file`."""
    key: str | None = None
    """Dotted configuration key or record field."""
    remedy: str | None = None
    """What the user can do."""

    def __str__(self) -> str:
        place = self.file or ""
        if self.line is not None:
            place = f"{place}:{self.line}"
        parts = [part for part in (place, self.key) if part]
        text = f"{': '.join(parts)}: {self.message}" if parts else self.message
        return f"{text}\n    -> {self.remedy}" if self.remedy else text


class TriptychError(Exception):
    """Base of every error meant for the user. Carries one or more problems; `str()` lists them all."""

    def __init__(self, problems: str | Problem | list[Problem], **where: object) -> None:
        if isinstance(problems, str):
            problems = Problem(problems, **where)  # type: ignore[arg-type]
        self.problems: list[Problem] = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__(str(self))

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        head = f"{len(self.problems)} problems:"
        return "\n".join([head, *(f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1))])


class ConfigError(TriptychError):
    """A recipe or command line that cannot be run; all problems at once."""


class DataError(TriptychError):
    """A row, picture or file that cannot be used."""


class ModelError(TriptychError):
    """A model that cannot be loaded, composed or tuned as asked."""


class CheckpointError(TriptychError):
    """A checkpoint that is missing, damaged or belongs to another recipe."""


class TrainingError(TriptychError):
    """A run that must stop: non-finite numbers, parameters without gradient, a stopped source."""
