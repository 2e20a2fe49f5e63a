"""Every recipe that is shipped parses, says how to run it and what to expect, trains and resumes in a tiny version."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.recipes.command_server import CommandServer
from tests.recipes.test_kill_resume import outcome, same
from tests.recipes.tiny_recipes import LANGUAGE, TEXT, VISION, Files, write_files, write_recipe
from triptych.core.config import load_tree, validate
from triptych.stages.evaluating import read_evaluation
from triptych.stages.pipeline import Pipeline, read_stages

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))
STAGE_RECIPES = [path for path in SHIPPED if "stage" in yaml.safe_load(path.read_text())]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("files"))


def test_there_are_recipes() -> None:
    assert len(STAGE_RECIPES) >= 3


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_a_recipe_parses_and_its_stages_validate(path: Path) -> None:
    tree = load_tree(path)
    if tree.values.get("kind") == "pipeline":
        assert validate(Pipeline, tree).stages
    if tree.values.get("kind") == "evaluation":
        assert read_evaluation(tree).runs
        return
    assert read_stages(tree)


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_the_header_says_how_to_run_it_and_what_to_expect(path: Path) -> None:
    text = path.read_text()
    header = text[: re.search(r"^[^#\n]", text, re.MULTILINE).start()]  # type: ignore[union-attr]
    for word in ("Command", "Needs", "Expects"):
        assert re.search(rf"^# {word}: +\S", header, re.MULTILINE), word
    named = re.findall(r"recipes/\S+\.yaml", header)
    assert named and all((ROOT / name).is_file() for name in named)


@pytest.mark.requirement("G-7")
@pytest.mark.parametrize("path", STAGE_RECIPES, ids=name_of)
def test_a_tiny_version_trains_and_resumes(path: Path, server: CommandServer, files: Files, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", shrink(load_tree(path).values, files))
    output = tmp_path / "run"
    command = ["train", str(recipe), f"output={output}"]
    result = server.run(command, tmp_path / "whole.log")
    assert result.status == 0, result.log[-4000:]
    expected = outcome(output)
    checkpoints = output / "checkpoints"
    assert sorted(item.name for item in checkpoints.glob("step-*")) == ["step-00000001", "step-00000002"]
    shutil.rmtree(checkpoints / "step-00000002")
    shutil.rmtree(output / "model")
    (output / "finished.json").unlink()
    result = server.run(command, tmp_path / "resumed.log")
    assert result.status == 0, result.log[-4000:]
    found = outcome(output)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert same(value, found[name]), name


def shrink(values: dict[str, Any], files: Files) -> dict[str, Any]:
    """The recipe with tiny random models on drawn pictures, for two steps; all else as it is."""
    tiny: dict[str, Any] = {**values, "model": shrink_model(values["model"], files)}
    tiny["data"] = [shrink_data(item, files, "train") for item in values["data"]]
    batch = min(6, values["loader"]["global_batch"])
    loader = {key: value for key, value in values["loader"].items() if key != "epochs"}
    tiny["loader"] = {**loader, "steps": 2, "global_batch": batch, "micro_batch": (batch + 1) // 2}
    tiny["train"] = {**values.get("train", {}), "save_every": 1}
    if "evaluation" in values:
        held_out = [shrink_data(item, files, "test") for item in values["evaluation"]["data"]]
        tiny["evaluation"] = {**values["evaluation"], "data": held_out}
        if "max_new_tokens" in tiny["evaluation"]:
            tiny["evaluation"]["max_new_tokens"] = 2
    return tiny


def shrink_model(model: dict[str, Any], files: Files) -> dict[str, Any]:
    """Each part replaced by a tiny one; SmolLM2-135M keeps its 30 layers, which the tuning rules name."""
    parts: dict[str, Any] = {
        "vision": {"config": VISION},
        "text": {"config": {**TEXT, "max_position_embeddings": 128}, "tokenizer": str(files.tokenizer)},
        "language": {
            "config": {**LANGUAGE, "num_hidden_layers": 30, "max_position_embeddings": 2048},
            "tokenizer": str(files.tokenizer),
        },
    }
    if "from" in model:  # the model of an earlier stage
        model = {"vision": {}, "language": {}}
    return {key: parts.get(key, value) for key, value in model.items()}


def shrink_data(item: dict[str, Any], files: Files, split: str) -> dict[str, Any]:
    """The drawn data set in the same format."""
    names = {
        "llava": f"{split}.json",
        "messages": f"{split}.json",
        "captions": f"{split}.csv",
        "preference": "pairs.json",
    }
    own = {"path": str(files.data / names[item["format"]]), "images": str(files.data / "pictures")}
    # The drawn conversations are in LLaVA's layout, which the format `messages` does not read.
    return {**item, **own, "format": "llava" if item["format"] == "messages" else item["format"]}
