"""Build a stage, train it, and leave a finished run folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method

from triptych import __version__
from triptych.core.config import ConfigTree
from triptych.core.distributed import call_on_main, is_main
from triptych.core.protocols import Evaluator, FeatureStore
from triptych.data.loader import LoaderConfig
from triptych.data.mixture import Mixture
from triptych.engine.allocator import keep_memory
from triptych.engine.checkpoint import Checkpoints
from triptych.engine.lock import check_writable, locked
from triptych.engine.monitors import build_monitors
from triptych.engine.parallel import Runtime
from triptych.engine.state import seed_everything
from triptych.engine.train_config import TrainConfig
from triptych.engine.trainer import FitResult, Trainer
from triptych.models.tuning import check_gradients
from triptych.models.vlm import VlmScorer
from triptych.stages.build import Built, preflight, resolved, settled, training_loader
from triptych.stages.doctor import environment
from triptych.stages.keeping import open_store
from triptych.stages.micro_batch import PLANNED, Found, settle_loader
from triptych.stages.recipe import StageRecipe
from triptych.stages.state_files import write_whole

FINISHED = "finished.json"
"""Written last; a pipeline skips a stage whose folder has it."""
RECIPE = "recipe.yaml"
"""The recipe of a run with every default filled in."""
FACTS = "facts.json"
"""The tuning plan, the environment and the measured micro-batch of a run."""


def run_stage(recipe: StageRecipe, build: Callable[[Any], Built], tree: ConfigTree, *, dry_run: bool = False) -> None:
    """Train one stage into `recipe.output`; an unfinished run resumes from its newest checkpoint."""
    if not dry_run:  # which may be for another machine
        check_writable(Path(recipe.output))
    runtime = Runtime(recipe.train.runtime)
    console = Console(quiet=not is_main())
    if recipe.train.runtime.keep_memory and runtime.device.type == "cpu":
        keep_memory()
    seed_everything(recipe.train.seed)
    built = build(recipe)
    preflight(recipe, built, None if dry_run else runtime.device)  # a dry run may be for another machine
    if dry_run:
        show_plan(recipe, built, console)
        return
    output = Path(recipe.output)
    built.show(console)
    show_choices(recipe, built, console, runtime)
    is_new = call_on_main(lambda: not has_checkpoint(output))
    with locked(output):
        if is_new:
            # With a checkpoint, the recipe may be another one, which is refused below: it must not replace the file.
            call_on_main(partial(write_recipe, recipe, output))
        else:  # before anything that takes long: the checkpoints may be those of another recipe
            Checkpoints(output / "checkpoints", resolved(recipe), recipe.train.keep_last).resumable()
        store = open_store(recipe, built, runtime, console, is_new=is_new)
        built.prepare(runtime, console)
    scorer = wrap_scorer(built, runtime)
    loader, found = settle_loader(recipe, built, runtime, scorer, is_new=is_new, console=console)
    if is_new:
        call_on_main(partial(write_facts, built, output, found))
    trainer = make_trainer(recipe, built, runtime, output, scorer, loader, store)
    if is_new:
        built.show_answers("before training")
    try:
        result = trainer.fit()
    finally:
        if store is not None:
            store.flush()
    built.show_answers("after training")
    call_on_main(partial(write_finished, recipe, output, result))
    for name, value in result.evaluation.items():
        console.print(f"{name}: {value:.4g}")
    console.print(f"model: {output / 'model'}", soft_wrap=True)


def has_checkpoint(output: Path) -> bool:
    """Whether a run in this folder has something to resume from."""
    return any((output / "checkpoints").glob("step-*"))


def write_finished(recipe: StageRecipe, output: Path, result: FitResult) -> None:
    """Write what marks a run as finished, last of all its files."""
    write_recipe(recipe, output)
    summary = {"steps": result.progress.step, "best_step": result.best_step, "evaluation": dict(result.evaluation)}
    text = json.dumps(summary, indent=1) + "\n"
    # A finished run that is started again ends as it did: stages that began from its model stay valid.
    if not (output / FINISHED).is_file() or (output / FINISHED).read_text(encoding="utf-8") != text:
        write_whole(output / FINISHED, text)


def write_recipe(recipe: StageRecipe, output: Path) -> None:
    """Write the resolved recipe into the folder of the run, where `export` finds it."""
    write_whole(output / RECIPE, yaml.safe_dump(resolved(recipe), sort_keys=False, allow_unicode=True))


def write_facts(built: Built, output: Path, found: Found | None = None) -> None:
    """Write what is known at the run's beginning: the tuning plan, the environment, what `micro_batch: auto` found."""
    facts = {"tuning": built.plan.summary(), "environment": {"triptych": __version__, **environment()}}
    if found is not None:
        facts["micro_batch"] = asdict(found)
    (output / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def wrap_scorer(built: Built, runtime: Runtime) -> nn.Module:
    """The scorer as it trains: on its device, in its mode, wrapped for several processes."""
    scorer = built.scorer
    scorer.train()
    wrapped: nn.Module = runtime.wrap(scorer, built.blocks)
    if isinstance(scorer, VlmScorer):
        # Without effect unless the weights are sharded: answers then need them gathered, as the forward pass does.
        register_fsdp_forward_method(scorer, "generate")
    return wrapped


def make_trainer(
    recipe: StageRecipe,
    built: Built,
    runtime: Runtime,
    output: Path,
    scorer: nn.Module,
    loader: LoaderConfig,
    store: FeatureStore | None,
) -> Trainer:
    """Put the trainer together.

    Args:
        scorer: as `wrap_scorer` returned it.
        loader: the recipe's, without `auto`.
        store: knows what a frozen tower makes of pictures.
    """
    evaluators: list[Evaluator] = built.evaluators(scorer, runtime)
    source = training_loader(built, loader, output, store)
    return Trainer(
        scorer=scorer,
        objective=built.objective,
        source=source,
        groups=built.groups,
        config=recipe.train,
        runtime=runtime,
        output=output,
        recipe=resolved(recipe),
        monitors=build_monitors(recipe.train.monitors, output, recipe.train.log_every),
        evaluators=evaluators,
        reference=built.reference,
        save_model=built.save,
        gradient_check=check_gradients,
        after_step=built.after_step,
        global_batch=recipe.loader.global_batch,
    )


def show_choices(recipe: StageRecipe, built: Built, console: Console, runtime: Runtime | None = None) -> None:
    """What the recipe may have left open, and a setting that the others leave without effect.

    Args:
        runtime: None in a dry run, which may be for another machine.
    """

    def say(words: str) -> None:
        console.print(words, markup=False, highlight=False, soft_wrap=True)

    if runtime is not None:
        say(f"device {runtime.device.type}, precision {runtime.precision}, strategy {runtime.strategy}")
    if built.by_picture:
        say(f"loader.rows_per_picture: up to {recipe.loader.most_per_picture} rows about a picture follow each other")
    limit = recipe.train.memory_limit
    if recipe.loader.micro_batch != "auto" and limit != TrainConfig().memory_limit:
        say(f"train.memory_limit: {limit} has no effect, since `loader.micro_batch` is not `auto`")


def show_plan(recipe: StageRecipe, built: Built, console: Console) -> None:
    """What would be trained, on how many rows, in how many steps, and from which of them on."""
    built.show(console)
    show_choices(recipe, built, console)
    mixture = Mixture([len(item) for item in built.datasets], [item.config.weight for item in built.datasets], 0)
    for dataset, quota in zip(built.datasets, mixture.quotas, strict=True):
        console.print(f"{dataset.name}: {len(dataset)} rows, {quota} draws an epoch", markup=False)
    loader = training_loader(built, settled(recipe.loader))
    console.print(
        f"{loader.total_windows} steps of {recipe.loader.global_batch} examples, into {recipe.output}", markup=False
    )
    if recipe.loader.micro_batch == "auto":
        console.print(PLANNED)
    step = Checkpoints(Path(recipe.output) / "checkpoints", resolved(recipe), recipe.train.keep_last).resumable()
    if step is not None:
        console.print(f"{recipe.output} holds a run of this recipe: it would resume at step {step}", soft_wrap=True)
