"""`triptych train`: one recipe, or a pipeline of recipes that hand their models on."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from triptych.core.config import (
    Config,
    ConfigTree,
    config_problem,
    did_you_mean,
    differing_keys,
    load_tree,
    parse_key,
    validate,
)
from triptych.core.distributed import call_on_main, is_main
from triptych.core.errors import ConfigError, Problem
from triptych.engine.checkpoint import EVALUATION, MAY_CHANGE
from triptych.engine.parallel import join, leave
from triptych.stages.build import Built, resolved
from triptych.stages.evaluating import EvaluationRecipe, read_evaluation, run_evaluation
from triptych.stages.locate import in_recipe
from triptych.stages.recipe import StageRecipe
from triptych.stages.run import FINISHED, RECIPE, has_checkpoint, run_stage
from triptych.stages.state_files import write_state
from triptych.stages.table import STAGES

MODEL = "model"
CLOSING = ("loss", "accuracy", "perplexity")
"""Measures of the closing table, beside recall@1."""
CONTENTS = "pipeline.json"
"""The stages of a pipeline's folder."""


class PipelineStage(Config):
    """One recipe of a pipeline."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    """How later stages refer to this one, and its folder; letters, digits, `_`, `-` and `.`."""
    recipe: str
    """Recipe or evaluation file, relative to the pipeline file."""
    title: str = ""
    """What it does, shown while it runs."""
    about: str = ""
    """Why, in a few lines, shown when it starts."""
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
    stages: list[PipelineStage] = Field(min_length=1)
    """In order."""


@dataclass(frozen=True)
class Stage:
    """One recipe to run, read and validated."""

    title: str
    """Empty for a recipe that is not part of a pipeline."""
    tree: ConfigTree
    recipe: StageRecipe | EvaluationRecipe
    build: Callable[..., Built] | None
    """None for an evaluation, which trains nothing."""
    sources: tuple[Path, ...] = ()
    """Folders of the stages whose models it starts from."""
    about: str = ""

    @property
    def output(self) -> Path:
        """Folder of the run."""
        assert self.recipe.output is not None
        return Path(self.recipe.output)

    @property
    def is_ready(self) -> bool:
        """Whether the models it starts from exist; while a pipeline runs, this changes."""
        return all((source / FINISHED).is_file() for source in self.sources)

    def skips(self) -> bool:
        """Whether it is part of a pipeline and finished before, with this recipe and these models.

        Raises:
            ConfigError: what the folder holds comes from another recipe, or from models that were trained again.
        """
        if not self.title or isinstance(self.recipe, EvaluationRecipe):  # an evaluation knows itself what it has done
            return False
        self._check_sources()
        if not (self.output / FINISHED).is_file():
            return False
        saved = yaml.safe_load((self.output / RECIPE).read_text(encoding="utf-8"))
        now = yaml.safe_load(yaml.safe_dump(resolved(self.recipe)))
        keys = MAY_CHANGE if self.recipe.train.best else (*MAY_CHANGE, *EVALUATION)
        may_change = tuple(f"{key}{end}" for key in keys for end in (":", ".", "["))
        changed = [text for text in differing_keys(saved, now) if not text.startswith(may_change)]
        remedy = f"put the value back, delete {self.output} to train it again, or choose another output"
        problems = [
            Problem(f"finished with another recipe: {text}", str(self.output), remedy=remedy) for text in changed
        ]
        if problems:
            raise ConfigError(problems)
        return True

    def _check_sources(self) -> None:
        # A run without a checkpoint starts anew, whatever its folder holds.
        names = (FINISHED, RECIPE) if has_checkpoint(self.output) else (FINISHED,)
        began = next((self.output / name for name in names if (self.output / name).is_file()), None)
        finished = [source / FINISHED for source in self.sources if (source / FINISHED).is_file()]
        problems = [
            Problem(
                f"started from the model in {file.parent}, which was finished again after that",
                file=str(self.output),
                remedy=f"delete {self.output} to train it again (if only the files' times are wrong: touch {began})",
            )
            for file in finished
            if began is not None and file.stat().st_mtime_ns > began.stat().st_mtime_ns
        ]
        if problems:
            raise ConfigError(problems)


def train(path: Path, overrides: Sequence[str] = (), *, dry_run: bool = False) -> None:
    """Run a recipe or pipeline file; unfinished runs resume.

    Raises:
        ConfigError: the file, a recipe of it or an override is wrong; all problems at once, before anything runs.
        TrainingError: this is one of several processes and in no group.
        TriptychError, OSError: a stage failed.
    """
    tree = load_tree(path, overrides)
    stages = read_stages(tree)
    for stage in stages:
        stage.skips()  # what it refuses is said before anything runs
    join()
    console = Console(quiet=not is_main())
    if tree.values.get("kind") == "pipeline" and not dry_run:
        call_on_main(partial(write_contents, Path(tree.values["output"]), stages))
    for stage in stages:
        if stage.title:
            console.rule(stage.title)
        if stage.about:
            console.print(Text(stage.about.strip(), style="dim"))
        if stage.skips():
            console.print(f"finished before: {stage.output}", soft_wrap=True)
            continue
        if dry_run and not stage.is_ready:
            console.print("starts from the model of a stage that is not finished")
            continue
        with in_recipe(stage.tree):
            _run(stage, dry_run)
        gc.collect()  # a sharded model is part of cycles, and would lie beside that of the next stage
    if len(stages) > 1 and not dry_run and is_main():
        console.print(closing_table(stages))
    leave()


def closing_table(stages: Sequence[Stage]) -> Table:
    """A line for each stage that trained: steps, what its last evaluation measured, where its model is."""
    table = Table("stage", "steps", "held out", "model", title="What came out")
    for stage in stages:
        if stage.build is None:
            continue
        finished = json.loads((stage.output / FINISHED).read_text(encoding="utf-8"))
        measured = finished["evaluation"]
        shown = [name for name in measured if name in CLOSING or name.endswith("@1")]
        values = ", ".join(f"{name} {measured[name]:.3g}" for name in shown)
        table.add_row(stage.output.name, str(finished["steps"]), values, Text(str(stage.output / MODEL)))
    return table


def _run(stage: Stage, dry_run: bool) -> None:
    if isinstance(stage.recipe, EvaluationRecipe):
        if not dry_run:
            call_on_main(partial(run_evaluation, stage.recipe), is_long=True)
        return
    assert stage.build is not None
    run_stage(stage.recipe, stage.build, stage.tree, dry_run=dry_run)


def write_contents(output: Path, stages: Sequence[Stage]) -> None:
    """Write the stages of a pipeline in order, for those who look at its folder later."""
    contents = [{"title": stage.title, "folder": os.path.relpath(stage.output, output)} for stage in stages]
    write_state(output / CONTENTS, {"stages": contents})


def read_stages(tree: ConfigTree) -> list[Stage]:
    """The recipes of a file in order, read and validated.

    Raises:
        ConfigError: the pipeline is wrong, or recipes of it are; all problems at once.
    """
    if tree.values.get("kind") != "pipeline":
        return [_read_stage("", tree)]
    pipeline = validate(Pipeline, tree)
    _check_names(pipeline, tree)
    stages: list[Stage] = []
    problems: list[Problem] = []
    for number, item in enumerate(pipeline.stages, 1):
        title = f"{number}/{len(pipeline.stages)} {item.name}: {item.title or item.recipe}"
        sources = tuple(Path(pipeline.output) / source for source in item.init.values())
        try:
            stages.append(_read_stage(title, _stage_tree(pipeline, number - 1, tree), sources, item.about))
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    return stages


def find_stage(tree: ConfigTree) -> str:
    """The stage that a recipe names.

    Raises:
        ConfigError: it names none, or one that does not exist.
    """
    name = str(tree.values.get("stage", ""))
    if name not in STAGES:
        if "kind" in tree.values:
            message = f"a recipe with a `stage` belongs here, not a file of `kind: {tree.values['kind']}`"
            remedy = "a file of recipes is of `kind: pipeline`, and is no stage of another"
            if tree.values["kind"] == "evaluation":
                remedy = "run it with `triptych eval`, or as a stage of a pipeline"
            raise ConfigError(config_problem(tree, ("kind",), message, remedy))
        message = f"`stage: {name}` is not a stage" if name else "`stage` is required"
        raise ConfigError(config_problem(tree, ("stage",), message, did_you_mean(name, STAGES)))
    return name


def _read_stage(title: str, tree: ConfigTree, sources: tuple[Path, ...] = (), about: str = "") -> Stage:
    if title and tree.values.get("kind") == "evaluation":
        return Stage(title, tree, read_evaluation(tree), None, sources, about)
    schema, build = STAGES[find_stage(tree)]
    return Stage(title, tree, validate(schema, tree), build, sources, about)


def _stage_tree(pipeline: Pipeline, index: int, tree: ConfigTree) -> ConfigTree:
    """The recipe of a stage with what the pipeline file puts into it, located there."""
    stage = pipeline.stages[index]
    base = ("stages", index)
    given = {
        ("output",): (str(Path(pipeline.output) / stage.name), tree.locate((*base, "name"))),
        **{parse_key(key): (value, tree.locate((*base, "set", key))) for key, value in stage.set.items()},
        **{
            parse_key(key): (str(Path(pipeline.output) / source / MODEL), tree.locate((*base, "init", key)))
            for key, source in stage.init.items()
        },
    }
    return load_tree(tree.path.parent / stage.recipe, given=given)


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
