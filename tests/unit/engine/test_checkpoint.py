"""Checkpoints: complete or absent, damage is found, another recipe is refused, the best one is never deleted."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from triptych.core.errors import CheckpointError
from triptych.engine import checkpoint as module
from triptych.engine.checkpoint import Checkpoints, Snapshot, find_damage, read

RECIPE = {"stage": "tune", "train": {"seed": 1, "keep_last": 2, "optimizer": {"lr": 1e-3}}, "data": [{"path": "a"}]}


def snapshot(step: int) -> Snapshot:
    weights = {"layer.weight": torch.full((2, 3), float(step)), "scale": torch.tensor(step, dtype=torch.bfloat16)}
    optimizer = {"state": {"layer.weight": {"step": torch.tensor(float(step))}}, "groups": [{"betas": (0.9, 0.95)}]}
    shared = {"progress": {"step": step}, "monitors": {"a": None}}
    return Snapshot(step, weights, optimizer, shared, [{"source": {"position": 7 * step}}], {"loss": 0.5})


def checkpoints(folder: Path, keep_last: int = 2, **changes: object) -> Checkpoints:
    return Checkpoints(folder, {**RECIPE, **changes}, keep_last)


@pytest.mark.requirement("G-3")
def test_everything_saved_comes_back_equal(tmp_path: Path) -> None:
    path = checkpoints(tmp_path).save(snapshot(3), best_step=None)

    assert path == tmp_path / "step-00000003"
    loaded = checkpoints(tmp_path).load_newest()
    assert loaded is not None and loaded.path == path
    expected = snapshot(3)
    assert loaded.snapshot.step == 3
    assert torch.equal(loaded.snapshot.weights["layer.weight"], expected.weights["layer.weight"])
    assert loaded.snapshot.weights["scale"].dtype == torch.bfloat16
    assert loaded.snapshot.optimizer == expected.optimizer
    assert loaded.snapshot.shared == expected.shared
    assert loaded.snapshot.ranks == expected.ranks
    assert json.loads((path / "recipe.json").read_text()) == RECIPE
    assert json.loads((path / "manifest.json").read_text())["format"] == module.FORMAT


def test_without_a_checkpoint_the_run_starts_fresh(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "absent").load_newest() is None


@pytest.mark.requirement("G-4", "G-8")
def test_rotation_keeps_the_last_two_and_the_best(tmp_path: Path) -> None:
    store = checkpoints(tmp_path, keep_last=2)
    for step in (10, 20, 30, 40, 50):
        store.save(snapshot(step), best_step=10 if step < 40 else 40)
        if step == 30:
            assert store.steps() == [10, 20, 30]
            assert os.readlink(tmp_path / "best") == "step-00000010"

    assert store.steps() == [40, 50]
    assert os.readlink(tmp_path / "best") == "step-00000040"
    assert os.readlink(tmp_path / "last") == "step-00000050"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["best", "last", "step-00000040", "step-00000050"]


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt", "state.pt", "ranks.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "shorten", "delete"])
def test_damage_of_any_file_falls_back_with_a_warning(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = checkpoints(tmp_path)
    store.save(snapshot(1), None)
    file = store.save(snapshot(2), None) / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[content.index(b"crc32") if name == "manifest.json" else len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    elif damage == "shorten":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()

    with caplog.at_level(logging.WARNING):
        loaded = store.load_newest()

    assert loaded is not None and loaded.snapshot.step == 1
    assert name in caplog.text and "step-00000002.damaged" in caplog.text
    store.save(snapshot(2), None)
    assert find_damage(store.path(2)) is None


def test_when_all_are_damaged_the_run_does_not_silently_start_again(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    for step in (1, 2):
        (store.save(snapshot(step), None) / "state.pt").write_bytes(b"")

    with pytest.raises(CheckpointError, match="2 problems") as caught:
        store.load_newest()
    assert "step-00000001/state.pt: 0 bytes" in str(caught.value)
    assert store.steps() == [1, 2]


def test_a_changed_recipe_is_refused_and_every_differing_key_is_named(tmp_path: Path) -> None:
    checkpoints(tmp_path).save(snapshot(1), None)
    changed = {"seed": 2, "keep_last": 2, "optimizer": {"lr": 1e-3, "beta": 0.9}}

    with pytest.raises(CheckpointError) as caught:
        checkpoints(tmp_path, train=changed).load_newest()

    assert [problem.message for problem in caught.value.problems] == [
        "the recipe changed: train.optimizer.beta: None -> 0.9",
        "the recipe changed: train.seed: 1 -> 2",
    ]


def test_keys_that_cannot_change_a_weight_may_differ(tmp_path: Path) -> None:
    checkpoints(tmp_path).save(snapshot(1), None)
    changed = {**RECIPE["train"], "keep_last": 9, "save_every": 7, "monitors": [{"kind": "console"}]}  # type: ignore[dict-item]

    assert checkpoints(tmp_path, train=changed, output="elsewhere").load_newest() is not None


@pytest.mark.requirement("G-3")
def test_what_only_prepares_rows_may_differ_but_not_which_rows_they_are(tmp_path: Path) -> None:
    loader = {"global_batch": 4, "on_bad_row": "stop", "prefetch": 2, "decode_threads": 4, "report": None}
    checkpoints(tmp_path, loader=loader).save(snapshot(1), None)
    changed = {**loader, "on_bad_row": "skip", "prefetch": 0, "decode_threads": 1, "report": "bad.jsonl"}

    assert checkpoints(tmp_path, loader=changed).load_newest() is not None
    with pytest.raises(CheckpointError, match=r"loader\.global_batch: 4 -> 8"):
        checkpoints(tmp_path, loader={**changed, "global_batch": 8}).load_newest()


def test_evaluation_may_differ_while_it_has_chosen_nothing(tmp_path: Path) -> None:
    measured = {"data": ["b"], "batch": 4, "show": 0, "max_new_tokens": 8, "answers": False}
    other = {"data": ["b"], "batch": 2, "show": 3, "max_new_tokens": 9, "answers": True}
    best = {**RECIPE["train"], "best": {"metric": "loss"}}  # type: ignore[dict-item]
    typo = {**RECIPE["train"], "best": {"metric": "los"}}  # type: ignore[dict-item]

    done = replace(snapshot(1), summary={"evaluation": {"loss": 1.0}})
    checkpoints(tmp_path / "plain", evaluation=measured).save(done, None)
    assert checkpoints(tmp_path / "plain", evaluation=other).load_newest() is not None
    with pytest.raises(CheckpointError, match=r"evaluation\.data\[0\]"):
        checkpoints(tmp_path / "plain", evaluation={**other, "data": ["c"]}).load_newest()

    checkpoints(tmp_path / "chosen", evaluation=measured, train=best).save(done, None)
    with pytest.raises(CheckpointError, match="4 problems"):
        checkpoints(tmp_path / "chosen", evaluation=other, train=best).load_newest()
    with pytest.raises(CheckpointError, match=r"train\.best\.metric"):
        checkpoints(tmp_path / "chosen", evaluation=measured, train=typo).load_newest()

    checkpoints(tmp_path / "early", evaluation=measured, train=typo).save(snapshot(1), None)
    assert checkpoints(tmp_path / "early", evaluation=other, train=best).load_newest() is not None


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    two = Snapshot(1, {}, {}, {}, [{}, {}])
    checkpoints(tmp_path).save(two, None)

    with pytest.raises(CheckpointError, match="written by 2 ranks, resumed with 1"):
        checkpoints(tmp_path).load_newest()


def test_another_format_is_refused_not_taken_for_damage(tmp_path: Path) -> None:
    manifest = checkpoints(tmp_path).save(snapshot(1), None) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 99'))

    with pytest.raises(CheckpointError, match="format 99, this version reads 2"):
        checkpoints(tmp_path).load_newest()


def test_what_could_not_be_loaded_again_is_refused_when_saving(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    store.save(snapshot(1), None)

    with pytest.raises(CheckpointError, match=r"`ranks\[0\].seen` is a builtins.set"):
        store.save(Snapshot(2, {}, {}, {}, [{"seen": {1, 2}}]), None)
    assert store.steps() == [1]
    assert not list(tmp_path.glob(".writing-*"))


def test_no_file_of_a_checkpoint_is_unpickled(tmp_path: Path) -> None:
    path = checkpoints(tmp_path).save(snapshot(1), None)

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, ("true",)

    torch.save(Evil(), path / "state.pt")
    files = json.loads((path / "manifest.json").read_text())
    files["files"]["state.pt"] = {"bytes": (path / "state.pt").stat().st_size, "crc32": 0}
    (path / "manifest.json").write_text(json.dumps(files))

    with pytest.raises(Exception, match="Weights only load failed"):
        read(path)


@pytest.mark.parametrize("large", ["weights", "optimizer", "shared"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, large: str) -> None:
    """A limit on the size of files stands for the full disk."""
    store = checkpoints(tmp_path)
    store.save(snapshot(1), None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written: .* GiB free"):
            store.save(replace(snapshot(2), **{large: {"a": torch.zeros(100_000)}}), None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert sorted(item.name for item in tmp_path.iterdir()) == ["last", "step-00000001"]
    assert store.load_newest() is not None


@pytest.mark.parametrize("instant", range(1, 12))
def test_a_crash_between_any_two_disk_operations_keeps_a_usable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instant: int
) -> None:
    """The process dies at the n-th fsync, rename, replace or delete while the third checkpoint is saved."""
    store = checkpoints(tmp_path, keep_last=1)
    store.save(snapshot(1), None)
    store.save(snapshot(2), None)

    class Killed(BaseException):
        pass

    count = 0

    def dying(function: object) -> object:
        def call(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count >= instant:
                raise Killed
            return function(*arguments, **options)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (module, "_remove")):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        with contextlib.suppress(Killed):
            store.save(snapshot(3), None)

    loaded = checkpoints(tmp_path, keep_last=1).load_newest()
    assert loaded is not None and loaded.snapshot.step in (2, 3)
    assert not list(tmp_path.glob(".*step*"))
    store.save(snapshot(3), None)
    store.save(snapshot(4), None)
    assert store.steps() == [4]


WRITER = """
import sys, torch
from pathlib import Path
from triptych.engine.checkpoint import Checkpoints, Snapshot
torch.set_num_threads(1)
store = Checkpoints(Path(sys.argv[1]), {}, 2)
loaded = store.load_newest()
start = loaded.snapshot.step if loaded else 0
print("ready", flush=True)
for step in range(start + 1, 1_000_000):
    store.save(Snapshot(step, {"w": torch.full((1000,), float(step))}, {}, {}, [{}]), max(1, step - step % 5))
"""


def test_killed_while_saving_in_a_loop(tmp_path: Path) -> None:
    last = 0
    for delay in (0.03, 0.11, 0.27):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        loaded = Checkpoints(tmp_path, {}, 2).load_newest()
        if loaded is None:
            assert last == 0
            continue
        assert loaded.snapshot.step >= last
        assert torch.equal(loaded.snapshot.weights["w"], torch.full((1000,), float(loaded.snapshot.step)))
        last = loaded.snapshot.step
    assert last > 1
