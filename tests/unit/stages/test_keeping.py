"""Runs that keep what a frozen tower makes of pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.commands import FP32, triptych, write
from tests.recipes.tiny_recipes import Files, tune
from triptych.stages import keeping

RULES = [
    {"match": "vision", "method": "frozen"},
    {"match": "connector", "method": "full"},
    {"match": "language", "method": "full"},
]


def recipe(files: Files, folder: Path, **changes: Any) -> Path:
    values = {"output": str(folder / "run"), **tune(files), "tuning": RULES}
    loader = {"global_batch": 8, "micro_batch": 8, "epochs": 2, "prefetch": 0}
    return write(folder / "recipe.yaml", values, **{"loader": loader, "train": {"save_every": 1}, **changes})


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "step"]


def model(folder: Path) -> dict[str, Any]:
    return load_file(folder / "run" / "model" / "model.safetensors")


def decision(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "features.json").read_text())


def stop_before_the_end(run: Path, decision: str) -> None:
    """As if the run had decided so and been stopped before its last checkpoint."""
    (run / "features.json").write_text(decision)
    shutil.rmtree(sorted((run / "checkpoints").glob("step-*"))[-1])


@pytest.mark.requirement("I-17")
def test_a_run_that_keeps_features_learns_the_same(files: Files, tmp_path: Path) -> None:
    plain, kept = tmp_path / "plain", tmp_path / "kept"
    assert triptych("train", recipe(files, plain, features={"keep": "never"}), FP32).status == 0
    done = triptych("train", recipe(files, kept, features={"keep": "always"}), FP32)
    assert done.status == 0, done.err
    assert "features of pictures: kept, as the recipe says" in done.out
    assert losses(kept) == pytest.approx(losses(plain), rel=1e-5)
    assert list((kept / "run" / "features").glob("*/*.safetensors"))
    assert not (plain / "run" / "features").exists()


def test_an_interrupted_run_ends_as_one_that_was_not(files: Files, tmp_path: Path) -> None:
    """Whatever of the features was on disk when it stopped, and with pictures decoded ahead."""
    file = recipe(files, tmp_path, features={"keep": "always"}, loader={"prefetch": 2})
    assert triptych("train", file).status == 0
    whole = model(tmp_path)
    run = tmp_path / "run"
    steps = sorted((run / "checkpoints").glob("step-*"))
    for step in steps[2:]:
        shutil.rmtree(step)
    (run / "finished.json").unlink()
    shutil.rmtree(run / "features")
    done = triptych("train", file)
    assert done.status == 0, done.err
    assert all((whole[name] == value).all() for name, value in model(tmp_path).items())


def test_auto_keeps_where_pictures_come_twice_and_reading_is_faster(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = triptych("train", recipe(files, tmp_path / "once", loader={"epochs": 1}))
    assert once.status == 0 and decision(tmp_path / "once")["keeps"] is False
    assert "a picture goes through the tower 1.0 times on average, which is hardly twice" in once.out
    # One pass shows a picture as often as rows about it stand apart.
    data = tune(files)["data"] * 2
    apart = recipe(files, tmp_path / "apart", data=data, loader={"epochs": 1, "rows_per_picture": 1})
    assert triptych("train", apart).status == 0 and "ms to read" in decision(tmp_path / "apart")["reason"]
    for keeps in (True, False):
        clock = iter(_Clock(computing=1.0, reading=0.5 if keeps else 2.0))
        monkeypatch.setattr(keeping.time, "perf_counter", lambda clock=clock: next(clock))
        folder = tmp_path / str(keeps)
        done = triptych("train", recipe(files, folder, train={"save_every": 100}))
        monkeypatch.undo()
        assert done.status == 0, done.err
        assert decision(folder)["keeps"] is keeps
        assert "takes 1000.0 ms to compute" in decision(folder)["reason"]


class _Clock:
    """Instants that the probe sees: its pictures are computed, then read; after that the time does not matter."""

    def __init__(self, computing: float, reading: float) -> None:
        self._steps = [computing] * (keeping.PROBED + 1) + [reading] * (keeping.PROBED + 1)

    def __iter__(self) -> Any:
        now = 0.0
        for step in self._steps:
            yield now
            now += step
            yield now
        while True:
            now += 1.0
            yield now


def test_a_resumed_run_decides_as_it_did(files: Files, tmp_path: Path) -> None:
    file = recipe(files, tmp_path)
    assert triptych("train", file).status == 0
    stop_before_the_end(tmp_path / "run", '{"keeps": true, "reason": "because"}')
    done = triptych("train", file)
    assert done.status == 0 and "features of pictures: kept, because" in done.out


def test_a_folder_is_shared_by_runs_with_the_same_tower(files: Files, tmp_path: Path) -> None:
    shared = {"keep": "always", "folder": str(tmp_path / "shared")}
    assert triptych("train", recipe(files, tmp_path / "one", features=shared)).status == 0
    (tower,) = (tmp_path / "shared").iterdir()
    before = sorted(file.name for file in tower.iterdir())
    done = triptych("train", recipe(files, tmp_path / "two", features={**shared, "keep": "auto"}, loader={"epochs": 1}))
    assert done.status == 0 and "to compute" in done.out  # once is worth it where they are there already
    again = triptych("train", recipe(files, tmp_path / "three", features=shared, lr=1e-4))
    assert again.status == 0
    assert sorted(file.name for file in tower.iterdir()) == before


def test_a_tower_that_trains_is_refused_or_left_alone(files: Files, tmp_path: Path) -> None:
    rules = [{**rule, "method": "full"} for rule in RULES]
    done = triptych("train", recipe(files, tmp_path / "always", tuning=rules, features={"keep": "always"}))
    assert done.status == 1 and "features.keep" in done.err and "the vision tower trains" in done.err
    done = triptych("train", recipe(files, tmp_path / "auto", tuning=rules))
    assert done.status == 0 and "not kept, the vision tower trains" in done.out


def test_a_row_that_cannot_be_used_does_not_stop_the_probe(files: Files, tmp_path: Path) -> None:
    values = tune(files)
    rows = json.loads(Path(values["data"][0]["path"]).read_text())
    rows[0]["image"] = "gone.png"
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(rows))
    data = [{**values["data"][0], "path": str(broken)}]
    done = triptych("train", recipe(files, tmp_path, data=data, loader={"on_bad_row": "skip"}))
    assert done.status == 0, done.err
    assert "to compute" in decision(tmp_path)["reason"]


def test_a_run_that_kept_features_cannot_go_on_where_they_cannot_be_kept(files: Files, tmp_path: Path) -> None:
    rules = [{**rule, "method": "full"} for rule in RULES]
    file = recipe(files, tmp_path, tuning=rules)
    assert triptych("train", file).status == 0
    stop_before_the_end(tmp_path / "run", '{"keeps": true, "reason": "because"}')
    done = triptych("train", file)
    assert done.status == 1 and "resume as the run began" in done.err
