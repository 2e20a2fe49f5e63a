"""`triptych report`: one self-contained HTML page about a run or a pipeline."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from triptych.core.errors import ConfigError, DataError, Problem
from triptych.data.images import decode, resolve_image
from triptych.evaluation.answers import Answer
from triptych.stages.evaluating import SUMMARY, read_answers
from triptych.stages.pipeline import CONTENTS
from triptych.stages.run import FACTS, FINISHED, RECIPE
from triptych.web import charts

LOG = "log.jsonl"
THUMBNAIL = 192
"""Longest side, in pixels, of the pictures inside the page."""
EACH = 2
"""Right answers, and as many wrong ones, shown of each task."""


@dataclass(frozen=True)
class StageReport:
    """One run folder."""

    title: str
    folder: Path
    events: list[dict[str, Any]]
    facts: Mapping[str, Any]
    recipe: Mapping[str, Any]
    results: Mapping[str, float]
    is_finished: bool

    @property
    def losses(self) -> list[tuple[float, float]]:
        """(step, loss) of the steps whose loss is a finite number."""
        found = [(event["step"], event["loss"]) for event in self.events if event["event"] == "step"]
        return [(step, loss) for step, loss in found if isinstance(loss, float | int) and math.isfinite(loss)]

    @property
    def row(self) -> dict[str, Any]:
        """The stage's line in the page's table."""
        steps = [event for event in self.events if event["event"] == "step"]
        return {
            "title": self.title,
            "steps": max((event["step"] for event in steps), default=0),
            "samples": sum(event["samples"] for event in steps),
            "seconds": sum(event["seconds"] for event in steps),
            "results": {
                name: value
                for name, value in self.results.items()
                if name == "loss" or name.startswith("accuracy") or name.endswith("@1")
            },
            "is_finished": self.is_finished,
            "tuning": self.facts.get("tuning", []),
        }

    def shares(self) -> charts.Chart | None:
        """Accuracies and recalls over the steps; None where there are fewer than two evaluations."""
        series: dict[str, list[tuple[float, float]]] = {}
        for event in self.events:
            if event["event"] == "evaluation":
                for name, value in event["results"].items():
                    if name.startswith(("accuracy", "recall")) and isinstance(value, float | int):
                        series.setdefault(name.removeprefix("accuracy/"), []).append((event["step"], value))
        longer = [(name, points) for name, points in series.items() if len({step for step, _ in points}) > 1]
        return charts.shares(f"{self.title}: held-out", longer) if longer else None


def write_report(run: Path, output: Path | None = None) -> tuple[Path, int]:
    """Write the page; by default `report.html` in the folder of the run.

    Returns:
        The file, and how many pictures of sample answers were not found: paths in recipes are relative to the working
        directory.

    Raises:
        ConfigError: the folder holds no run.
    """
    stages = _read_stages(run)
    evaluations = sorted(run.glob(f"*/{SUMMARY}")) + ([run / SUMMARY] if (run / SUMMARY).is_file() else [])
    target = output or run / "report.html"
    content = _content(run, stages, evaluations)
    target.write_text(_environment().from_string(_template()).render(**content), encoding="utf-8")
    shown = [picture for sample in content["samples"] for picture in sample["pictures"]]
    return target, sum(picture["uri"] is None for picture in shown)


def _content(run: Path, stages: Sequence[StageReport], evaluations: Sequence[Path]) -> dict[str, Any]:
    summaries = [json.loads(file.read_text(encoding="utf-8")) for file in evaluations]
    drawn = [charts.losses("loss, each stage on its own scale", [(s.title, s.losses) for s in stages if s.losses])]
    drawn = [item for item in drawn if item.lines] + [item for s in stages if (item := s.shares()) is not None]
    tables = [table for summary in summaries for table in _tables(summary)]
    replies = [item for file in evaluations for item in _evaluated(file)] or _shown(stages)
    samples = _samples(replies)
    credit = "Pictures: OpenMoji (openmoji.org), CC BY-SA 4.0."
    has_scenes = any((root.parent / "scenes.json").is_file() for item in replies for root in item.roots)
    return {
        "title": run.resolve().name,
        "folder": str(run),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "evaluations": tables,
        "has_blind": any("blind" in table["runs"] for table in tables),
        "charts": drawn,
        "stages": [stage.row for stage in stages],
        "samples": samples,
        "confusions": [table for summary in summaries for table in _confusions(summary)],
        "environment": next((s.facts["environment"] for s in reversed(stages) if "environment" in s.facts), {}),
        "credit": credit if has_scenes else "",
        "width": charts.WIDTH,
        "height": charts.HEIGHT,
        "left": charts.LEFT,
        "right": charts.RIGHT,
        "top": charts.TOP,
        "bottom": charts.BOTTOM,
    }


def _read_stages(run: Path) -> list[StageReport]:
    if (run / CONTENTS).is_file():
        contents = json.loads((run / CONTENTS).read_text(encoding="utf-8"))["stages"]
        found = [(item["title"], run / item["folder"]) for item in contents]
        return [_read_stage(title, folder) for title, folder in found if (folder / RECIPE).is_file()]
    if not (run / RECIPE).is_file():
        message = f"no run in this folder ({RECIPE} and {CONTENTS} are missing)"
        remedy = "give the `output` of a recipe or pipeline that was trained"
        raise ConfigError(Problem(message, file=str(run), remedy=remedy))
    return [_read_stage(run.resolve().name, run)]


def _read_stage(title: str, folder: Path) -> StageReport:
    log = folder / LOG
    finished, facts = ({}, {})
    if (folder / FINISHED).is_file():
        finished = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
    if (folder / FACTS).is_file():
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return StageReport(
        title=title.partition(":")[0] if ":" in title else title,
        folder=folder,
        events=[json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else [],
        facts=facts,
        recipe=yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8")),
        results=finished.get("evaluation", {}),
        is_finished=bool(finished),
    )


def _tables(summary: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """One table for each data set of an evaluation."""
    for table in summary["tables"]:
        runs, gains = table["summaries"], table["gains"]
        first = next(iter(runs.values()))
        yield {
            "name": table["title"],
            "runs": list(runs),
            "differences": [f"{gain['run']} - {gain['rival']}" for gain in gains],
            "rows": [
                {
                    "task": task,
                    "cells": [tasks.get(task) for tasks in runs.values()],
                    "gains": [gain["tasks"].get(task) for gain in gains],
                }
                for task in dict.fromkeys(task for tasks in runs.values() for task in tasks)
            ],
            "counts": [{"task": task, **item} for task, item in first.items() if item["count_error"] is not None],
        }


def _confusions(summary: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """What the first run takes for what, for each task of few answers."""
    for name, runs in ((table["title"], table["summaries"]) for table in summary["tables"]):
        for task, item in next(iter(runs.values())).items():
            table = item["confusion"]
            if len(table) > 2:
                columns = [*table, "(other)"]
                rows = [
                    {"truth": truth, "right": columns.index(truth), "counts": [said.get(name, 0) for name in columns]}
                    for truth, said in table.items()
                ]
                yield {"title": f"{name}, {task}: truth and answer", "columns": columns, "rows": rows}


@dataclass(frozen=True)
class _Replies:
    """The answers of a run and where its pictures lie."""

    run: str
    answers: tuple[Answer, ...]
    roots: tuple[Path, ...]


def _evaluated(summary: Path) -> list[_Replies]:
    """The answers beside a summary, those of the first run first."""
    tree = json.loads(summary.read_text(encoding="utf-8"))
    found = []
    for name, runs in ((table["title"], table["summaries"]) for table in tree["tables"]):
        for run in runs:
            file = summary.parent / f"{run}-{name}.jsonl"
            stamp = summary.parent / f"{run}-{name}.json"
            if file.is_file() and stamp.is_file():
                roots = _roots([json.loads(stamp.read_text(encoding="utf-8"))["data"]])
                found.append(_Replies(run, read_answers(file), roots))
    return found


def _shown(stages: Sequence[StageReport]) -> list[_Replies]:
    """The answers that the last stage wrote before and after it was trained."""
    for stage in reversed(stages):
        files = [(moment, stage.folder / f"answers-{moment}-training.jsonl") for moment in ("after", "before")]
        found = [(moment, file) for moment, file in files if file.is_file()]
        if found:
            roots = _roots((stage.recipe.get("evaluation") or {}).get("data", []))
            return [_Replies(moment, read_answers(file), roots) for moment, file in found]
    return []


def _roots(configs: Iterable[Mapping[str, Any]]) -> tuple[Path, ...]:
    return tuple(Path(config["images"] or Path(config["path"]).parent) for config in configs)


def _samples(replies: Sequence[_Replies]) -> list[dict[str, Any]]:
    """A few right and a few wrong answers of each task, beside what the other runs said."""
    if not replies:
        return []
    said: dict[tuple[str, str, str], list[tuple[str, Answer]]] = {}
    for item in replies:
        for answer in item.answers:
            said.setdefault((answer.origin, answer.question, answer.truth), []).append((item.run, answer))
    main = replies[0].run
    kept: dict[tuple[str, bool], int] = {}
    chosen = []
    for item in replies:
        if item.run != main:
            continue
        for answer in item.answers:
            key = (answer.task, answer.is_right)
            if kept.get(key, 0) < EACH:
                kept[key] = kept.get(key, 0) + 1
                chosen.append(_sample(answer, said[answer.origin, answer.question, answer.truth], item.roots))
    order = list(dict.fromkeys(sample["task"] for sample in chosen))  # tasks that were trained for usually come first
    return sorted(chosen, key=lambda sample: order.index(sample["task"]))


def _sample(answer: Answer, said: Sequence[tuple[str, Answer]], roots: Sequence[Path]) -> dict[str, Any]:
    return {
        "task": answer.task,
        "question": answer.question,
        "truth": answer.truth,
        "pictures": [{"name": name, "uri": _thumbnail(name, roots)} for name in answer.pictures],
        "replies": [{"run": run, "text": item.prediction, "is_right": item.is_right} for run, item in said],
    }


def _thumbnail(name: str, roots: Sequence[Path]) -> str | None:
    """The picture as a data URI; None where it is not a file below one of the roots."""
    for root in roots:
        try:
            picture = decode(resolve_image(root, name))
        except (DataError, OSError):
            continue
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        encoded = io.BytesIO()
        picture.save(encoded, "PNG")
        return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()
    return None


def _environment() -> Environment:
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _template() -> str:
    return resources.files("triptych.web").joinpath("templates/report.html").read_text(encoding="utf-8")
