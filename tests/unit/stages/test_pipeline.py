"""Pipelines hand models on, skip what is finished and resume where they stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText

from tests.commands import Outcome, triptych, write
from tests.recipes.tiny_recipes import Files, contrastive, tune
from triptych.core import distributed
from triptych.core.config import load_tree
from triptych.core.errors import ConfigError
from triptych.stages import pipeline as pipeline_module
from triptych.stages.build import resolved
from triptych.stages.pipeline import read_stages


def write_pipeline(folder: Path, files: Files, **changes: Any) -> Path:
    """A contrastive tower that becomes the vision part of a composed model, which is then tuned once more."""
    train = {"save_every": 1, "evaluate_every": None, "best": None}
    short = {"global_batch": 8, "micro_batch": 8, "epochs": None, "steps": 2}
    write(folder / "towers.yaml", {"output": "x", **contrastive(files)}, loader=short)
    values = tune(files)
    tuning = [{"match": "vision", "method": "frozen"}, *values["tuning"][1:]]
    model = {**values["model"], "vision": {"from": "unset"}}
    write(folder / "instruct.yaml", {"output": "x", **values}, loader=short, train=train, tuning=tuning, model=model)
    again = {**values, "model": {"from": "unset"}, "template": "model"}
    write(folder / "again.yaml", {"output": "x", **again}, loader=short, train=train, tuning=tuning)
    pipeline = {
        "kind": "pipeline",
        "output": str(folder / "run"),
        "stages": [
            {"name": "towers", "recipe": "towers.yaml", "title": "see", "about": "eyes first"},
            {
                "name": "instruct",
                "recipe": "instruct.yaml",
                "init": {"model.vision.from": "towers"},
                "set": {"lr": 1.0e-3},
            },
            {"name": "again", "recipe": "again.yaml", "init": {"model.from": "instruct"}},
        ],
        **changes,
    }
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    return folder / "pipeline.yaml"


def succeed(outcome: Outcome) -> str:
    assert outcome.status == 0, outcome.err
    return outcome.out


def test_stages_hand_their_models_on_and_a_second_start_skips_what_is_finished(files: Files, tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path, files)
    dry = succeed(triptych("train", pipeline, "--dry-run"))
    assert "1/3 towers: see" in dry and dry.count("starts from the model of a stage that is not finished") == 2
    assert not (tmp_path / "run").exists()

    succeed(triptych("train", pipeline))
    run = tmp_path / "run"
    tower = AutoModel.from_pretrained(run / "towers" / "model").vision_model.state_dict()
    composed = AutoModelForImageTextToText.from_pretrained(run / "instruct" / "model")
    vision = composed.model.vision_tower.state_dict()
    shared = vision.keys() & tower.keys()
    assert len(shared) > 20 and all((vision[name] == tower[name]).all() for name in shared)
    assert yaml.safe_load((run / "instruct" / "recipe.yaml").read_text())["lr"] == 1.0e-3
    assert json.loads((run / "again" / "finished.json").read_text())["steps"] == 2

    # As if the run had stopped after the first step of the last stage.
    (run / "again" / "finished.json").unlink()
    shutil.rmtree(run / "again" / "checkpoints" / "step-00000002")
    stamp = (run / "towers" / "finished.json").stat().st_mtime_ns
    before = load_file(run / "again" / "model" / "model.safetensors")
    second = succeed(triptych("train", pipeline))
    assert second.count("eyes first") == 1
    assert second.count("finished before") == 2 and "start at step 1 of 2" in second
    assert (run / "towers" / "finished.json").stat().st_mtime_ns == stamp
    after = load_file(run / "again" / "model" / "model.safetensors")
    assert all((before[name] == item).all() for name, item in after.items())
    third = succeed(triptych("train", pipeline))
    assert third.count("finished before") == 3
    contents = json.loads((tmp_path / "run" / "pipeline.json").read_text())["stages"]
    assert [item["folder"] for item in contents] == ["towers", "instruct", "again"]
    assert contents[0]["title"] == "1/3 towers: see"


def test_an_evaluation_is_a_stage_that_gets_its_models_and_is_computed_once(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[bool] = []

    def call(work: Callable[[], object], *, is_long: bool = False) -> object:
        waits.append(is_long)
        return distributed.call_on_main(work, is_long=is_long)

    monkeypatch.setattr(pipeline_module, "call_on_main", call)
    pipeline = write_pipeline(tmp_path, files)
    tree = yaml.safe_load(pipeline.read_text())
    tree["stages"][2] = {
        "name": "judge",
        "recipe": "judge.yaml",
        "init": {"runs.0.model": "instruct", "runs[1].model": "instruct"},
    }
    pipeline.write_text(yaml.safe_dump(tree))
    data = {"format": "llava", "path": str(files.data / "test.json"), "images": str(files.data / "pictures")}
    runs = [{"name": "after", "model": "unset", "limit": 3}, {"name": "blind", "model": "unset", "pictures": "grey"}]
    judge = {"kind": "evaluation", "data": {"test": data}, "runs": runs, "max_new_tokens": 1}
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump(judge))
    assert succeed(triptych("check", pipeline, "--samples", "0")).count("0 errors, 0 warnings") == 3
    planned = succeed(triptych("train", pipeline, "--dry-run"))
    assert "3/3 judge" in planned and not (tmp_path / "run" / "judge").exists()
    assert "after: 3 questions of test" in succeed(triptych("train", pipeline))
    answers = tmp_path / "run" / "judge" / "after-test.jsonl"
    assert len(answers.read_text().splitlines()) == 3
    assert waits == [False, True]  # the list of stages, and the evaluation, which may take hours
    assert "questions of test" not in succeed(triptych("train", pipeline))
    page = succeed(triptych("report", tmp_path / "run"))
    assert page.startswith("report: ") and "Right answers" in (tmp_path / "run" / "report.html").read_text()
    alone = triptych("train", tmp_path / "judge.yaml")
    assert alone.status == 1 and "run it with `triptych eval`" in alone.err


def test_a_pipeline_is_checked_as_a_whole(files: Files, tmp_path: Path) -> None:
    checked = succeed(triptych("check", write_pipeline(tmp_path, files), "--samples", "0"))
    assert checked.count("0 errors, 0 warnings") == 3
    assert checked.count("Tuning plan") == 1  # the others start from models that are yet to be made


def problems(file: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_stages(load_tree(file))
    return str(caught.value)


def test_names_and_init_are_checked_with_file_and_line(files: Files, tmp_path: Path) -> None:
    stages = [
        {"name": "towers", "recipe": "towers.yaml"},
        {"name": "towers", "recipe": "instruct.yaml", "init": {"model.vision.from": "tower"}},
    ]
    said = problems(write_pipeline(tmp_path, files, stages=stages))
    assert "two stages are called `towers`" in said
    assert "`tower` is not an earlier stage" in said and "did you mean `towers`?" in said
    assert "pipeline.yaml:6: stages[1].name" in said
    said = problems(write_pipeline(tmp_path, files, stages=[{"name": "a", "recipe": "nope.yaml"}]))
    assert "recipe not found" in said and "nope.yaml" in said
    said = problems(write_pipeline(tmp_path, files, stages=[{"name": "a", "recipe": "again.yaml", "ini": {}}]))
    assert "unknown key `ini`" in said and "did you mean `init`" in said


def test_keys_that_a_pipeline_sets_are_located_in_it(files: Files, tmp_path: Path) -> None:
    stages = [
        {"name": "towers", "recipe": "towers.yaml"},
        {"name": "tune", "recipe": "instruct.yaml", "init": {"model.vison.from": "towers"}, "set": {"lr": -1}},
    ]
    said = problems(write_pipeline(tmp_path, files, stages=stages))
    assert "pipeline.yaml:9: model.vison: unknown key `vison`" in said, said
    assert "pipeline.yaml:11: lr: " in said, said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: pipeline\noutput: x\nstages: []\n", "pipeline.yaml:3: stages: (.|\n)*at least 1"),
        (
            "kind: pipelin\noutput: x\nstages: []\n",
            "pipeline.yaml:1: kind: (.|\n)*recipes is of `kind: pipeline`",
        ),
        (
            "kind: pipeline\noutput: x\nstages: [{name: a, recipe: pipeline.yaml}]\n",
            "not a file of `kind: pipeline`(.|\n)*is no stage of another",
        ),
        ("kind: pipeline\noutput: x\nstages: [{name: ../a, recipe: a.yaml}]\n", r"stages\[0\].name: (.|\n)*pattern"),
    ],
)
def test_files_that_are_no_pipeline(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text(text)
    for command in ("check", "train"):
        done = triptych(command, tmp_path / "pipeline.yaml")
        assert done.status == 1 and re.search(said, done.err), done.err


def test_overrides_do_not_reach_into_the_recipes_of_a_pipeline(files: Files, tmp_path: Path) -> None:
    outcome = triptych("train", write_pipeline(tmp_path, files), "lr=0.1")
    assert outcome.status == 1
    assert "unknown key `lr`" in outcome.err and "command line" in outcome.err


def test_a_finished_stage_is_skipped_only_for_the_same_recipe_and_models(files: Files, tmp_path: Path) -> None:
    pipeline, run = write_pipeline(tmp_path, files), tmp_path / "run"
    for name in ("towers", "instruct", "again"):
        (run / name).mkdir(parents=True)
        stage = next(item for item in read_stages(load_tree(pipeline)) if item.output.name == name)
        (run / name / "recipe.yaml").write_text(yaml.safe_dump(resolved(stage.recipe)))
        (run / name / "finished.json").write_text(json.dumps({"steps": 3, "evaluation": {"recall_i2t@1": 0.5}}))
        assert stage.is_ready and stage.skips()
    said = succeed(triptych("train", pipeline))
    assert said.count("finished before") == 3
    assert "What came out" in said and said.count("recall_i2t@1 0.5") == 3

    write(tmp_path / "towers.yaml", yaml.safe_load((tmp_path / "towers.yaml").read_text()), lr=0.5, max_length=40)
    refused = triptych("train", pipeline)
    assert refused.status == 1 and "finished with another recipe: lr: 0.003 -> 0.5" in refused.err
    assert "finished with another recipe: max_length: 48 -> 40" in refused.err
    assert f"delete {run / 'towers'}" in refused.err and "choose another output" in refused.err

    write_pipeline(tmp_path, files)
    values = yaml.safe_load((tmp_path / "towers.yaml").read_text())
    write(tmp_path / "towers.yaml", values, train={"log_every": 7})  # changes no weight
    old = (run / "instruct" / "finished.json").stat().st_mtime_ns
    os.utime(run / "towers" / "finished.json", ns=(old + 10**9, old + 10**9))
    refused = triptych("train", pipeline)
    assert refused.status == 1 and refused.out == ""
    assert f"started from the model in {run / 'towers'}, which was finished again" in refused.err
    assert f"delete {run / 'instruct'} to train it again" in refused.err


def test_every_recipe_is_validated_before_the_first_is_run(files: Files, tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path, files)
    for name in ("instruct", "again"):
        values = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        write(tmp_path / f"{name}.yaml", values, loader={"micro_batches": 3})
    refused = triptych("train", pipeline)
    assert refused.status == 1 and "2 problems" in refused.err
    assert "instruct.yaml:" in refused.err and "again.yaml:" in refused.err
    assert not (tmp_path / "run").exists()
