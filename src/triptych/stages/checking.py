"""`triptych check`: everything that can be found before a GPU is rented."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from triptych.core.config import load_tree
from triptych.core.errors import DataError
from triptych.core.types import Sample
from triptych.data.check import CheckReport, Finding, check_datasets, open_datasets
from triptych.data.formats import Dataset
from triptych.data.show import show_example
from triptych.engine.state import seed_everything
from triptych.stages.build import Built, preflight
from triptych.stages.evaluating import EvaluationRecipe
from triptych.stages.locate import in_recipe
from triptych.stages.micro_batch import PLANNED
from triptych.stages.pipeline import Stage, read_stages


def check(path: Path, overrides: Sequence[str] = (), *, samples: int = 1, console: Console | None = None) -> bool:
    """Check the data and the plan of a recipe, or of every stage of a pipeline; False where there are errors.

    A pipeline's later stages start from models that earlier ones have yet to make; for those only the data's rows and
    pictures are checked.

    Raises:
        ConfigError: the recipe itself is wrong.
        ModelError: the model cannot be loaded or tuned as asked.
    """
    console = console or Console()
    results = []
    for stage in read_stages(load_tree(path, overrides)):
        if stage.title:
            console.rule(stage.title)
        with in_recipe(stage.tree):
            results.append(_check_stage(stage, samples, console))
    return all(results)


def _check_stage(stage: Stage, samples: int, console: Console) -> bool:
    recipe = stage.recipe
    if isinstance(recipe, EvaluationRecipe):
        configs = list(recipe.data.values())
    else:
        configs = [*recipe.data, *(recipe.evaluation.data if recipe.evaluation else ())]
    datasets, findings = open_datasets(configs, Path.cwd())
    built = None
    if not isinstance(recipe, EvaluationRecipe) and stage.build is not None and stage.is_ready and not findings:
        seed_everything(recipe.train.seed)
        built = stage.build(recipe)
        preflight(recipe, built)
        built.show(console)
        if recipe.loader.micro_batch == "auto":
            console.print(PLANNED)
        findings += [Finding("warning", problem, "template") for problem in built.lint()]
        for sample in _first_good(datasets, built, samples):
            console.print(show_example(built.encode(sample), built.tokenizer))
    report = _walk(datasets, findings, built, console)
    console.print(report.render(), soft_wrap=True)
    return not report.has_errors


def _walk(datasets: list[Dataset], findings: list[Finding], built: Built | None, console: Console) -> CheckReport:
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("reading every row", total=sum(len(item) for item in datasets))
        return check_datasets(
            datasets,
            built.encode if built else None,
            built.pictures if built else None,
            findings=findings,
            advance=lambda: progress.advance(task),
        )


def _first_good(datasets: list[Dataset], built: Built, count: int) -> list[Sample]:
    """The first rows that can be used, `count` shared by the data sets, the earlier ones getting more."""
    found: list[Sample] = []
    for number, dataset in enumerate(datasets):
        share = -(-(count - len(found)) // (len(datasets) - number))
        found += itertools.islice(_good(dataset, built), share)
    return found


def _good(dataset: Dataset, built: Built) -> Iterator[Sample]:
    for index in range(len(dataset)):
        try:
            sample = dataset.sample(index)
            built.encode(sample)
        except DataError:
            continue
        yield sample
