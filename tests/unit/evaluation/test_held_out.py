"""The held-out loss is the training loss of the same rows, however they are batched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.commands import read_recipe, write
from tests.recipes.tiny_recipes import RECIPES, Files, write_files
from triptych.core.errors import TrainingError
from triptych.core.types import Progress
from triptych.engine.parallel import Runtime, RuntimeConfig
from triptych.engine.state import seed_everything
from triptych.engine.step import run_window
from triptych.evaluation.held_out import HeldOutLoss
from triptych.stages.build import Built, make_held_out_loader, make_loader
from triptych.stages.table import STAGES

KINDS = list(RECIPES)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("files"))


def build(kind: str, files: Files, folder: Path) -> tuple[Built, Any]:
    recipe = read_recipe(write(folder / "recipe.yaml", {"output": str(folder / "run"), **RECIPES[kind](files)}))
    _, stage = STAGES[recipe.stage]
    seed_everything(0)
    built = stage(recipe)
    built.prepare(Runtime(RuntimeConfig(precision="fp32")), Console(quiet=True))
    with torch.no_grad():  # away from the reference, where margins are rounding alone
        for parameter in built.scorer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return built, recipe


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_loss_of_training_and_independent_of_the_batch(kind: str, files: Files, tmp_path: Path) -> None:
    built, recipe = build(kind, files, tmp_path)
    runtime = Runtime(RuntimeConfig(precision="fp32"))
    datasets = built.datasets[:1]
    total = len(datasets[0])
    built.scorer.train()
    results = []
    for batch in (5, total):
        source = make_held_out_loader(datasets, built.encode, built.pictures, batch)
        evaluator = HeldOutLoss(built.scorer, built.objective, source, built.reference, runtime)
        results += [evaluator.run(), evaluator.run()]  # again: the source starts over
        assert built.scorer.training
    assert results[0] == results[1]
    for name, value in results[0].items():
        assert results[2][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    loader = recipe.loader.model_copy(update={"global_batch": total, "micro_batch": 7, "prefetch": 0})
    training = make_loader(datasets, built.encode, built.pictures, loader, None, by_picture=True, packed=True)
    window = next(iter(training.windows()))
    built.scorer.eval()
    trained = run_window(built.scorer, built.objective, window, training, built.reference, runtime, Progress(0, None))
    assert results[0]["loss"] == pytest.approx(trained.loss, rel=1e-5, abs=1e-6)
    assert results[0]["loss"] > 0.1


def test_it_leaves_no_gradient_and_keeps_frozen_parts_in_their_mode(files: Files, tmp_path: Path) -> None:
    built, _ = build("dpo", files, tmp_path)
    source = make_held_out_loader(built.datasets, built.encode, built.pictures, 12)
    built.scorer.train()
    modes = [module.training for module in built.scorer.modules()]
    assert not all(modes)
    HeldOutLoss(built.scorer, built.objective, source, built.reference, Runtime(RuntimeConfig())).run()
    assert [module.training for module in built.scorer.modules()] == modes
    assert all(parameter.grad is None for parameter in built.scorer.parameters())
    assert torch.is_grad_enabled()


def test_a_source_of_several_windows_is_refused(files: Files, tmp_path: Path) -> None:
    built, recipe = build("language", files, tmp_path)
    source = make_loader(
        built.datasets, built.encode, built.pictures, recipe.loader, None, by_picture=True, packed=True
    )
    with pytest.raises(TrainingError, match="must be one window, this one has 10"):
        HeldOutLoss(built.scorer, built.objective, source, None, Runtime(RuntimeConfig()))
