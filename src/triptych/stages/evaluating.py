"""`triptych eval`: models, shown the pictures or grey ones, answer the questions of data files; tables side by side."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import Field, TypeAdapter, ValidationError
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from triptych.core.config import (
    Config,
    ConfigTree,
    command_line_tree,
    config_problem,
    did_you_mean,
    load_tree,
    validate,
)
from triptych.core.errors import ConfigError, DataError, Problem
from triptych.core.types import ImageReference, Sample
from triptych.data.fingerprint import fingerprint_file
from triptych.data.formats import FORMATS, AnyDatasetConfig
from triptych.evaluation.answers import Answer
from triptych.evaluation.metrics import MetricName
from triptych.evaluation.summary import Difference, TaskSummary, compare, summarise
from triptych.stages.build import open_datasets
from triptych.stages.recipe import PlainDataset
from triptych.stages.state_files import write_whole
from triptych.stages.using import answering_of, load_for_use

SUMMARY = "summary.json"
"""File in the output folder: every table in one."""
GREY = (128, 128, 128)
"""RGB of the pictures a blind model is shown."""


class EvaluationRun(Config):
    """One model that answers."""

    name: str = Field(pattern=r"^[A-Za-z0-9_]+$")
    """Its column in the tables, and the beginning of its files' names."""
    model: str
    """Folder of a finished model."""
    pictures: Literal["shown", "grey"] = "shown"
    """`grey`: every picture is replaced by an even mid-grey of its size, which tells what guessing gets (blind)."""
    data: tuple[str, ...] = ()
    """Names of the data sets it answers; empty: all."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first rows of each data set only."""
    against: str | None = None
    """Name of the run it is compared with; default: the first."""


class EvaluationRecipe(Config):
    """A file for `triptych eval`."""

    kind: Literal["evaluation"]
    """Marks the file as an evaluation."""
    output: str | None = None
    """Folder for the answers (one JSON line each) and the summary. What it holds already is not computed again."""
    data: dict[str, PlainDataset] = Field(min_length=1)
    """Name -> questions with true answers."""
    runs: tuple[EvaluationRun, ...] = Field(min_length=1)
    """The models, in the order of the columns."""
    together: dict[str, tuple[str, ...]] = Field(default={})
    """Name -> runs whose answers are also counted together (the seeds of one way, say), in a table of their own; they
    are compared with those of the first name, run by run."""
    metrics: dict[str, MetricName] = Field(default={})
    """Task -> what makes an answer right: `exact` (default), `objects` (a caption lists the same things in the same
    numbers) or `number`."""
    batch: int = Field(default=16, ge=1)
    """Questions answered at a time."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest answer in tokens."""


@dataclass(frozen=True)
class Evaluated:
    """The answers of one run to one data set."""

    run: str
    data: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Gain:
    """How much one run is ahead of another on one data set."""

    run: str
    rival: str
    tasks: dict[str, Difference]
    """Task -> difference on the questions that both answered."""


@dataclass(frozen=True)
class EvaluationTable:
    """Runs side by side on one data set."""

    title: str
    summaries: dict[str, dict[str, TaskSummary]]
    """Run -> task -> summary."""
    gains: tuple[Gain, ...]


@dataclass(frozen=True)
class Questions:
    """The rows of a data set, and what tells whether they are still the same."""

    samples: tuple[Sample, ...]
    fingerprint: Mapping[str, str]
    """Data file -> digest."""


def read_evaluation(tree: ConfigTree) -> EvaluationRecipe:
    """Validate an evaluation file.

    Raises:
        ConfigError: a key is wrong, two runs share a name, or a run names a data set that is not there.
    """
    recipe = validate(EvaluationRecipe, tree)
    problems = []
    names: list[str] = []
    for index, run in enumerate(recipe.runs):
        if run.name in names:
            problems.append(config_problem(tree, ("runs", index, "name"), f"two runs are called `{run.name}`"))
        names.append(run.name)
        for number, data in enumerate(run.data):
            if data not in recipe.data:
                key = ("runs", index, "data", number)
                problems.append(
                    config_problem(tree, key, f"`{data}` is not in `data`", did_you_mean(data, recipe.data))
                )
    problems += list(_wrong_names(recipe, tree))
    if all(run.data for run in recipe.runs):
        unasked = [name for name in recipe.data if all(name not in run.data for run in recipe.runs)]
        problems += [config_problem(tree, ("data", name), f"no run answers `{name}`") for name in unasked]
    if problems:
        raise ConfigError(problems)
    return recipe


def _wrong_names(recipe: EvaluationRecipe, tree: ConfigTree) -> Iterator[Problem]:
    """Runs that are named to be compared or counted together, and are not there."""
    names = [run.name for run in recipe.runs]
    for index, run in enumerate(recipe.runs):
        if run.against is not None and (run.against not in names or run.against == run.name):
            message = f"`{run.against}` is no other run"
            yield config_problem(tree, ("runs", index, "against"), message, did_you_mean(run.against, names))
    sizes = {len(runs) for runs in recipe.together.values()}
    if len(sizes) > 1:
        remedy = "name the same seeds, in the same order"
        yield config_problem(tree, ("together",), "they have different numbers of runs", remedy)
    for name, members in recipe.together.items():
        for index, member in enumerate(members):
            if member not in names:
                remedy = did_you_mean(member, names)
                yield config_problem(tree, ("together", name, index), f"`{member}` is no run", remedy)


def evaluation_file(path: Path, overrides: Sequence[str]) -> EvaluationRecipe:
    """The recipe in a YAML file.

    Raises:
        ConfigError: it is wrong.
    """
    return read_evaluation(load_tree(path, overrides))


def simple_evaluation(
    data: AnyDatasetConfig,
    models: Mapping[str, Path],
    overrides: Sequence[str] = (),
    *,
    blind: bool = False,
    output: Path | None = None,
    limit: int | None = None,
) -> EvaluationRecipe:
    """The recipe for one data file.

    Args:
        data: The questions.
        models: Column -> folder of a model.
        overrides: `key.sub=value`, merged into the recipe.
        blind: Also let the first model answer about grey pictures.
        output: Folder for answers and summary.
        limit: Rows at most.

    Raises:
        ConfigError: an override is wrong.
    """
    runs: list[dict[str, Any]] = [
        {"name": name, "model": str(folder), "limit": limit} for name, folder in models.items()
    ]
    if blind:
        runs.append({**runs[0], "name": "blind", "pictures": "grey"})
    values = {
        "kind": "evaluation",
        "data": {re.sub(r"\W+", "_", Path(data.path).stem): data.model_dump(mode="json")},
        "runs": runs,
        **({} if output is None else {"output": str(output)}),
    }
    return read_evaluation(command_line_tree(values, overrides))


def dataset_config(data: Path, images: Path | None, format: str) -> AnyDatasetConfig:
    """A data set given on the command line.

    Raises:
        ConfigError: the format is not known, or holds no questions.
    """
    if format not in FORMATS:
        raise ConfigError(Problem(f"`{format}` is not a format", key="--format", remedy=did_you_mean(format, FORMATS)))
    values = {"format": format, "path": os.fspath(data), "images": None if images is None else os.fspath(images)}
    adapter: TypeAdapter[AnyDatasetConfig] = TypeAdapter(PlainDataset)
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        found = [(str(item["msg"]).removeprefix("Value error, "), item["loc"]) for item in error.errors()]
        raise ConfigError([Problem(text, key=".".join(map(str, key))) for text, key in found]) from error


def run_evaluation(recipe: EvaluationRecipe) -> dict[str, dict[str, dict[str, TaskSummary]]]:
    """Let every model answer, print the tables, and write answers and summary where the recipe names a folder.

    Returns:
        Title of a table (the data set) -> run -> task -> summary.

    Raises:
        DataError: rows that cannot be used, all at once.
        ModelError: a model cannot be loaded.
        OSError: the output folder cannot be written; found before anything is answered.
    """
    questions = _read_questions(recipe)
    if recipe.output is not None:
        Path(recipe.output).mkdir(parents=True, exist_ok=True)
    evaluated = [item for run in recipe.runs for item in _evaluate(recipe, run, questions)]
    tables = [table for name in recipe.data for table in _make_tables(recipe, name, evaluated)]
    console = Console(highlight=False)
    for table in tables:
        console.print(accuracy_table(table.title, table.summaries))
        if table.gains:
            console.print(gain_table(table.title, table.gains))
    if recipe.output is not None:
        content = [asdict(table) for table in tables]
        write_whole(Path(recipe.output) / SUMMARY, json.dumps({"tables": content}, indent=1) + "\n")
        console.print(f"answers: {recipe.output}", soft_wrap=True)
    return {table.title: table.summaries for table in tables}


def _make_tables(recipe: EvaluationRecipe, data: str, evaluated: Sequence[Evaluated]) -> Iterator[EvaluationTable]:
    """The runs that answered a data set; then those that are counted together."""
    answers = {item.run: item.answers for item in evaluated if item.data == data}
    first = next(iter(answers))
    rivals = {run.name: run.against or first for run in recipe.runs if run.name in answers}
    yield EvaluationTable(
        title=data,
        summaries={run: summarise(found) for run, found in answers.items()},
        gains=tuple(
            Gain(rival, run, compare([(answers[rival], answers[run])]))
            for run, rival in rivals.items()
            if rival != run and rival in answers
        ),
    )
    joined = {
        name: [answers[run] for run in runs]
        for name, runs in recipe.together.items()
        if all(run in answers for run in runs)
    }
    if joined:
        ahead, *others = joined
        yield EvaluationTable(
            title=f"{data}, together",
            summaries={name: summarise(list(itertools.chain(*found))) for name, found in joined.items()},
            gains=tuple(
                Gain(ahead, name, compare(list(zip(joined[ahead], joined[name], strict=True)))) for name in others
            ),
        )


def _read_questions(recipe: EvaluationRecipe) -> dict[str, Questions]:
    """The rows of every data set; every row that cannot be used is an error, all at once."""
    questions = {}
    problems: list[Problem] = []
    for name, config in recipe.data.items():
        (dataset,) = open_datasets([config])
        samples = []
        for index in range(len(dataset)):
            try:
                samples.append(dataset.sample(index))
            except DataError as error:
                problems += error.problems
        questions[name] = Questions(tuple(samples), dataset.fingerprint())
    if problems:
        raise DataError(problems)
    return questions


def _evaluate(recipe: EvaluationRecipe, run: EvaluationRun, questions: Mapping[str, Questions]) -> Iterator[Evaluated]:
    """The answers of a run to each of its data sets, read where the output folder has them."""
    answering = None
    console = Console(highlight=False)
    for name in run.data or tuple(recipe.data):
        asked = questions[name].samples[: run.limit]
        stamp = _stamp(recipe, run, name, questions[name]) if recipe.output is not None else {}
        answers = _read_answers(recipe, run, name, stamp)
        if answers is None:
            if answering is None:
                answering = answering_of(load_for_use(Path(run.model)), recipe.max_new_tokens, recipe.batch)
                if run.pictures == "grey":
                    answering = replace(answering, decode=blind(answering.decode))
            count = _count_questions(asked)
            console.print(f"{run.name}: {count} questions of {name}")
            with Progress(*Progress.get_default_columns(), console=console, transient=True) as progress:
                bar = progress.add_task("answering", total=count)
                found = answering.run(asked, recipe.metrics, partial(progress.advance, bar))
            answers = tuple(found)
            if recipe.output is not None:
                lines = "".join(json.dumps(answer.row(), ensure_ascii=False) + "\n" for answer in answers)
                # Killed between the two files, new answers must not stand beside the stamp of old ones.
                _file(recipe, run, name, ".json").unlink(missing_ok=True)
                write_whole(_file(recipe, run, name, ".jsonl"), lines)
                write_whole(_file(recipe, run, name, ".json"), json.dumps(stamp, indent=1) + "\n")
        yield Evaluated(run.name, name, answers)


def blind(show: Callable[[ImageReference], Image.Image]) -> Callable[[ImageReference], Image.Image]:
    """Pictures of the same size, all of one grey."""

    def grey(image: ImageReference) -> Image.Image:
        return Image.new("RGB", show(image).size, GREY)

    return grey


def _count_questions(samples: Sequence[Sample]) -> int:
    return sum(message.role == "assistant" for sample in samples for message in sample.messages)


def _stamp(recipe: EvaluationRecipe, run: EvaluationRun, data: str, questions: Questions) -> dict[str, Any]:
    """What answers depend on; equal stamps mean equal answers. Pictures that are files count with size and time."""
    model = Path(run.model)
    files = sorted(file for file in model.rglob("*") if file.is_file()) if model.is_dir() else []
    paths = {image.path for sample in questions.samples[: run.limit] for image in sample.images if image.path}
    shown = hashlib.blake2b(digest_size=16)
    for path in sorted(paths):
        status = os.stat(path) if os.path.exists(path) else None
        shown.update(f"{path} {status and (status.st_size, status.st_mtime_ns)}\n".encode())
    return {
        "run": run.model_dump(mode="json", exclude={"data", "against"}),
        "data": recipe.data[data].model_dump(mode="json"),
        "rows": dict(questions.fingerprint),
        "pictures": shown.hexdigest(),
        "model": {str(file.relative_to(model)): fingerprint_file(file) for file in files},
        "metrics": dict(recipe.metrics),
        "batch": recipe.batch,
        "max_new_tokens": recipe.max_new_tokens,
    }


def _read_answers(
    recipe: EvaluationRecipe, run: EvaluationRun, data: str, stamp: Mapping[str, Any]
) -> tuple[Answer, ...] | None:
    if recipe.output is None or not _file(recipe, run, data, ".json").is_file():
        return None
    if json.loads(_file(recipe, run, data, ".json").read_text(encoding="utf-8")) != stamp:
        return None
    return read_answers(_file(recipe, run, data, ".jsonl"))


def read_answers(file: Path) -> tuple[Answer, ...]:
    """Answers as `run_evaluation` writes them."""
    with open(
        file, encoding="utf-8"
    ) as lines:  # str.splitlines() would also split at U+2028, which JSON leaves as it is
        rows = [json.loads(line) for line in lines]
    return tuple(_answer(row) for row in rows)


def _answer(row: Mapping[str, Any]) -> Answer:
    fields = {key: value for key, value in row.items() if key != "is_right"}
    return Answer(**{**fields, "pictures": tuple(row["pictures"])})


def _file(recipe: EvaluationRecipe, run: EvaluationRun, data: str, ending: str) -> Path:
    assert recipe.output is not None
    return Path(recipe.output) / f"{run.name}-{data}{ending}"


def accuracy_table(name: str, runs: Mapping[str, Mapping[str, TaskSummary]]) -> Table:
    """A line a task: n and accuracy with its 95 % interval for each run, in percent."""
    columns = {
        run: {
            task: (item.n, f"{_percent(item.accuracy, '.1f')} {_interval(item, '.0f')}") for task, item in tasks.items()
        }
        for run, tasks in runs.items()
    }
    return _table(f"{name}: % right, 95 % interval", columns)


def gain_table(name: str, gains: Sequence[Gain]) -> Table:
    """A line a task: n and how much one run is ahead of another, in points of percent."""
    runs = {gain.run for gain in gains}
    columns = {
        f"of {gain.rival}" if len(runs) == 1 else f"{gain.run} of {gain.rival}": {
            task: (item.n, f"{_percent(item.gain, '+.1f')} {_interval(item, '+.0f')}")
            for task, item in gain.tasks.items()
        }
        for gain in gains
    }
    return _table(f"{name}: points that {gains[0].run if len(runs) == 1 else 'a run'} is ahead", columns)


def _table(title: str, columns: Mapping[str, Mapping[str, tuple[int, str]]]) -> Table:
    """Column -> task -> (n, what to show)."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("task")
    for column in columns:
        table.add_column("n", justify="right")
        table.add_column(Text(column), justify="right")
    for task in dict.fromkeys(task for tasks in columns.values() for task in tasks):
        found = [tasks.get(task, ("", "")) for tasks in columns.values()]
        table.add_row(Text(task), *(str(part) for cell in found for part in cell))
    return table


def _interval(item: TaskSummary | Difference, form: str) -> str:
    return f"[{_percent(item.low, form)}, {_percent(item.high, form)}]"


def _percent(share: float, form: str) -> str:
    return format(100 * share, form)
