"""`triptych check`: everything that can be found before a GPU is rented."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from triptych.core.config import load_tree, validate
from triptych.core.errors import DataError
from triptych.core.types import Sample
from triptych.data.check import CheckReport, Finding, check_datasets, open_datasets
from triptych.data.formats import Dataset
from triptych.data.show import show_example
from triptych.engine.state import seed_everything
from triptych.stages import STAGES
from triptych.stages.build import Built
from triptych.stages.pipeline import find_stage, stage_trees


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
    for name, tree, is_ready in stage_trees(load_tree(path, overrides)):
        if name:
            console.rule(name)
        schema, build = STAGES[find_stage(tree)]
        recipe = validate(schema, tree)
        configs = [*recipe.data, *(recipe.evaluation.data if recipe.evaluation else ())]
        datasets, findings = open_datasets(configs, Path.cwd())
        built = None
        if is_ready and not findings:
            seed_everything(recipe.train.seed)
            built = build(recipe)
        results.append(_check_stage(datasets, findings, built, samples, console))
    return all(results)


def _check_stage(
    datasets: list[Dataset], findings: list[Finding], built: Built | None, samples: int, console: Console
) -> bool:
    if built is not None:
        console.print(built.plan.table())
        for sample in _first_good(datasets, built, samples):
            console.print(show_example(built.encode(sample), built.tokenizer))
    report = _walk(datasets, findings, built, console)
    console.print(report.render())
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
    found: list[Sample] = []
    for dataset in datasets:
        for index in range(len(dataset)):
            if len(found) == count:
                return found
            try:
                sample = dataset.sample(index)
                built.encode(sample)
            except DataError:
                continue
            found.append(sample)
    return found
