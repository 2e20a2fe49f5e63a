"""A step is the same with the micro-batch that `auto` finds, whatever the limit, as with one for all of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor

from tests.commands import FP32, read_recipe, write
from tests.invariants.toys import relative_distance, runtime
from tests.recipes.tiny_recipes import preference, tune, write_files
from triptych.core.types import Progress
from triptych.engine.micro_batch import Meter
from triptych.engine.state import seed_everything
from triptych.engine.step import run_window
from triptych.stages.build import Built, make_loader
from triptych.stages.micro_batch import settle_loader
from triptych.stages.preference import build_preference
from triptych.stages.run import wrap_scorer
from triptych.stages.tune import build_tune

MIB = 2**20


@pytest.mark.requirement("C-13", "F-28")
@pytest.mark.parametrize("kind", ["tune", "preference"])
def test_loss_and_gradients_do_not_depend_on_the_limit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Meter, "measure", lambda meter, *batches: int(batches[0].lengths.sum()) * MIB)
    files = write_files(tmp_path / "files")
    values, build = (tune, build_tune) if kind == "tune" else (preference, build_preference)
    changes = {
        "dtype": "float64",
        "loader": {"global_batch": 8, "micro_batch": "auto", "epochs": 1, "rows_per_picture": 2},
    }
    file = write(tmp_path / "recipe.yaml", {"output": str(tmp_path / "run"), **values(files)}, **changes)
    steps = {limit: step(file, f"train.memory_limit={limit}", build) for limit in ("300 MiB", "600 MiB", "9 GiB")}
    counts = [count for count, _, _ in steps.values()]
    assert counts[0] > counts[1] > counts[2] == 1
    _, loss, whole = steps["9 GiB"]
    for _, other, split in steps.values():
        assert other == pytest.approx(loss, rel=1e-10)
        assert relative_distance(whole, split) < 1e-9


def step(file: Path, limit: str, build: Any) -> tuple[int, float, dict[str, Tensor]]:
    """Micro-batches, loss and gradients of the first step without dropout."""
    recipe = read_recipe(file, limit, FP32)
    seed_everything(0)
    built: Built = build(recipe)
    engine = runtime()
    built.prepare(engine, Console(quiet=True))
    scorer = wrap_scorer(built, engine).eval()
    loader, found = settle_loader(recipe, built, engine, scorer, is_new=True, console=Console(quiet=True))
    assert found is not None and loader.micro_batch_tokens == found.tokens
    source = make_loader(
        built.datasets, built.encode, built.pictures, loader, None, by_picture=True, packed=built.packed
    )
    window = next(iter(source.windows()))
    result = run_window(scorer, built.objective, window, source, built.reference, engine, Progress(0, 1))
    found_gradients = {name: item.grad for name, item in scorer.named_parameters() if item.grad is not None}
    return len(window.batches), result.loss, found_gradients
