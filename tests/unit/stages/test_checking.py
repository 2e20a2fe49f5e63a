"""`triptych check`: every row and picture, the plan, token weights; exit status 1 on errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.commands import triptych, write
from tests.recipes.tiny_recipes import Files, contrastive, preference, tune
from triptych.models import logprobs


@pytest.mark.parametrize("values", [tune, contrastive, preference])
def test_good_data_passes_and_the_plan_and_a_row_are_shown(values: object, files: Files, tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml", {"output": str(tmp_path / "run"), **values(files)})  # type: ignore[operator]
    done = triptych("check", recipe)
    assert done.status == 0, done.err
    assert "Tuning plan" in done.out and "0 errors, 0 warnings" in done.out
    assert "(train-000-dog)" in done.out or "pairs-1" in done.out or "train-1" in done.out  # the row that is shown
    assert not (tmp_path / "run").exists()


def test_every_broken_row_is_named_and_the_exit_status_is_1(files: Files, tmp_path: Path) -> None:
    rows = json.loads((files.data / "train.json").read_text())[:4]
    rows[1]["image"] = "nope.png"
    rows[2]["conversations"][1]["value"] = ""
    rows[3]["conversations"][0]["value"] += " and" * 100
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"output": str(tmp_path / "run"), **tune(files)}
    data = [{"format": "llava", "path": str(tmp_path / "rows.jsonl"), "images": str(files.data / "pictures")}]
    done = triptych("check", write(tmp_path / "recipe.yaml", values, data=data), "--samples", "3")
    assert done.status == 1 and "Traceback" not in done.err
    out = " ".join(done.out.split())
    assert "rows.jsonl:2" in out and "nope.png" in out
    assert "rows.jsonl:3" in out and "empty" in out
    assert "rows.jsonl:4" in out and "more than max_length 128" in out
    assert "3 errors" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel works on a CUDA device")
def test_a_kernel_that_this_machine_cannot_run_is_refused_before_anything_runs(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(
        tmp_path / "recipe.yaml", {"output": str(tmp_path / "run"), **tune(files)}, head_kernel="cut_cross_entropy"
    )
    done = triptych("train", file)
    assert done.status == 1 and "head_kernel" in done.err and "needs a CUDA device" in done.err
    assert not (tmp_path / "run").exists()
    for command in (["check", file], ["train", file, "--dry-run"]):  # the run may be for another machine
        assert triptych(*command).status == 0
    monkeypatch.setattr(logprobs, "_cut_obstacle", lambda head, device: f"this head on {device}")
    for command in (["check", file], ["train", file, "--dry-run"]):
        done = triptych(*command)
        assert done.status == 1 and "this head on cuda" in done.err


def test_files_that_cannot_be_opened_are_reported_together(files: Files, tmp_path: Path) -> None:
    values = {"output": str(tmp_path / "run"), **tune(files)}
    data = [{"format": "llava", "path": str(tmp_path / name)} for name in ("a.json", "b.json")]
    done = triptych("check", write(tmp_path / "recipe.yaml", values, data=[*data, *values["data"]]))
    assert done.status == 1
    assert "a.json" in done.out and "b.json" in done.out and "2 errors" in done.out
    assert "24" in done.out  # the readable data set was checked all the same


def test_shown_rows_are_shared_by_the_data_sets(files: Files, tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml", {"output": str(tmp_path / "run"), **contrastive(files)})
    done = triptych("check", recipe, "--samples", "3")
    assert [f"{name})" in done.out for name in ("(train-1", "(train-2", "(train-3", "(test-1", "(test-2")] == [
        True,
        True,
        False,
        True,
        False,
    ]


def test_what_training_would_refuse_is_an_error_of_the_check(files: Files, tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml", {"output": str(tmp_path / "run"), **tune(files)})
    for command in (["check", recipe], ["train", recipe, "--dry-run"]):
        done = triptych(*command, "train.schedule={kind: three_phase, warmup: 9, cooldown: 9}")
        assert done.status == 1 and "do not fit into 10 steps" in done.err and "command line" in done.err
