"""`triptych train`: one recipe, or a pipeline of recipes that hand their models on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field
from rich.console import Console

from triptych.core.config import Config, ConfigTree, config_problem, did_you_mean, load_tree, validate
from triptych.core.distributed import is_main
from triptych.core.errors import ConfigError
from triptych.stages import STAGES
from triptych.stages.run import FINISHED, run_stage

MODEL = "model"


class PipelineStage(Config):
    """One recipe of a pipeline."""

    name: str
    """How later stages refer to this one."""
    recipe: str
    """Recipe file, relative to the pipeline file."""
    title: str = ""
    """What it does, shown while it runs."""
    init: dict[str, str] = Field(default={})
    """Key of this recipe -> name of an earlier stage whose model folder is put there (`model.vision.from: towers`)."""
    set: dict[str, object] = Field(default={})
    """Key of this recipe -> value that replaces the recipe's."""


class Pipeline(Config):
    """Recipes run in order; each starts at the first one that is not finished."""

    kind: Literal["pipeline"] = "pipeline"
    """Marks the file as a pipeline."""
    output: str
    """Folder of the pipeline; each stage writes to `output/<name>`."""
    stages: list[PipelineStage]
    """In order."""


def train(path: Path, overrides: Sequence[str] = (), *, dry_run: bool = False) -> None:
    """Run a recipe or pipeline file; unfinished runs resume.

    Raises:
        ConfigError: the file or an override is wrong; all problems at once.
    """
    console = Console(quiet=not is_main())
    for name, tree, is_ready in stage_trees(load_tree(path, overrides)):
        if name:
            console.rule(name)
        output = Path(str(tree.values.get("output", "")))
        if name and (output / FINISHED).is_file():
            console.print(f"finished before: {output}", soft_wrap=True)
            continue
        if dry_run and not is_ready:
            console.print("starts from the model of a stage that is not finished")
            continue
        schema, build = STAGES[find_stage(tree)]
        run_stage(validate(schema, tree), build, tree, dry_run=dry_run)


def stage_trees(tree: ConfigTree) -> Iterator[tuple[str, ConfigTree, bool]]:
    """The recipes of a file in order: title (empty for a single recipe), recipe, whether its starting models exist.

    Raises:
        ConfigError: the pipeline is wrong, or a recipe of it cannot be read.
    """
    if tree.values.get("kind") != "pipeline":
        yield "", tree, True
        return
    pipeline = validate(Pipeline, tree)
    _check_names(pipeline, tree)
    for number, stage in enumerate(pipeline.stages, 1):
        sources = [Path(pipeline.output) / source for source in stage.init.values()]
        # Asked for only now: while a pipeline runs, earlier stages finish between two turns of this loop.
        is_ready = all((source / FINISHED).is_file() for source in sources)
        title = f"{number}/{len(pipeline.stages)} {stage.name}: {stage.title or stage.recipe}"
        yield title, _stage_tree(pipeline, stage, tree.path.parent), is_ready


def find_stage(tree: ConfigTree) -> str:
    """The stage that a recipe names.

    Raises:
        ConfigError: it names none, or one that does not exist.
    """
    name = str(tree.values.get("stage", ""))
    if name not in STAGES:
        message = f"`stage: {name}` is not a stage" if name else "`stage` is required"
        raise ConfigError(config_problem(tree, ("stage",), message, did_you_mean(name, STAGES)))
    return name


def _stage_tree(pipeline: Pipeline, stage: PipelineStage, base: Path) -> ConfigTree:
    models = {key: str(Path(pipeline.output) / source / MODEL) for key, source in stage.init.items()}
    values = {"output": str(Path(pipeline.output) / stage.name), **stage.set, **models}
    return load_tree(base / stage.recipe, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def _check_names(pipeline: Pipeline, tree: ConfigTree) -> None:
    problems = []
    known: list[str] = []
    for index, stage in enumerate(pipeline.stages):
        if stage.name in known:
            problems.append(config_problem(tree, ("stages", index, "name"), f"two stages are called `{stage.name}`"))
        for key, source in stage.init.items():
            if source not in known:
                message = f"`{source}` is not an earlier stage"
                remedy = did_you_mean(source, known) if known else "the first stage has none before it"
                problems.append(config_problem(tree, ("stages", index, "init", key), message, remedy))
        known.append(stage.name)
    if problems:
        raise ConfigError(problems)
