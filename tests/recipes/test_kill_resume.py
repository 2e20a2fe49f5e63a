"""A run that is killed at any instants and started again ends with the same bits as one that was left alone."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes.command_server import CommandServer, Outcome
from tests.recipes.tiny_recipes import RECIPES, write_files, write_recipe

TIMES = {"seconds", "data_seconds", "memory_bytes"}
"""Fields of the log that are measured, not computed."""


@pytest.mark.requirement("G-3", "G-4", "G-7")
@pytest.mark.parametrize("objective", RECIPES)
def test_two_kills(objective: str, server: CommandServer, tmp_path: Path) -> None:
    check_kills(objective, server, tmp_path, kills=2)


@pytest.mark.slow
@pytest.mark.requirement("G-7")
@pytest.mark.parametrize("objective", RECIPES)
def test_ten_kills(objective: str, server: CommandServer, tmp_path: Path) -> None:
    check_kills(objective, server, tmp_path, kills=10)


@pytest.mark.requirement("G-7")
def test_kills_of_a_run_that_measures_its_micro_batch(server: CommandServer, tmp_path: Path) -> None:
    """Also while it measures, which it then does once more."""
    check_kills("language", server, tmp_path, kills=2, loader={"global_batch": 5, "micro_batch": "auto", "epochs": 2})
    numbers = [json.loads(file.read_text())["tokens"] for file in tmp_path.glob("*/micro_batch.json")]
    assert len(numbers) >= 2 and len(set(numbers)) == 1


def check_kills(objective: str, server: CommandServer, folder: Path, kills: int, **changes: Any) -> None:
    """Compare runs that were killed `kills` times in all with one that was not; `changes` are the recipe's."""
    files = write_files(folder / "files")
    recipe = write_recipe(folder / "recipe.yaml", {"output": "unset", **RECIPES[objective](files), **changes})
    whole = folder / "whole"
    seconds = succeed(train(server, recipe, whole)).seconds
    assert (whole / "finished.json").is_file()
    assert_randomness_matters(whole)
    expected = outcome(whole)
    generator = random.Random(f"{objective}-{kills}")
    lives = killed = 0
    instants: list[str] = []
    while killed < kills:
        # A run gets on between two kills, so that one alone would end before the last of them.
        lives += 1
        output = folder / f"killed-{lives}"
        while True:
            after = generator.uniform(0, seconds) if killed < kills else None
            result = train(server, recipe, output, after)
            if not result.was_killed:
                succeed(result)
                if result.seconds < seconds / 2 and not killed:
                    seconds = result.seconds  # the first run also filled the caches of the file system
                break
            killed += 1
            instants.append(f"{after:.2f} s, then at {checkpoints(output)}")
        found = outcome(output)
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert same(value, found[name]), f"{name} differs; killed after {instants}"
        assert log_lines(output) == log_lines(whole), f"killed after {instants}"
        assert (output / "checkpoints" / "last").readlink() == (whole / "checkpoints" / "last").readlink()
    print(f"{objective}: {killed} kills in {lives} runs of {seconds:.1f} s: {instants}")


def train(server: CommandServer, recipe: Path, output: Path, kill_after: float | None = None) -> Outcome:
    """`triptych train`, the same command every time."""
    log = output.with_suffix(".log")
    return server.run(["train", str(recipe), f"output={output}"], log, kill_after)


def succeed(result: Outcome) -> Outcome:
    """The outcome, or its output as the failure's message."""
    assert result.status == 0, result.log[-4000:]
    return result


def checkpoints(output: Path) -> list[str]:
    """What a killed run left."""
    folder = output / "checkpoints"
    return sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []


def outcome(output: Path) -> dict[str, Any]:
    """Everything that must not depend on kills: the finished model and all checkpoints that are kept."""
    found: dict[str, Any] = {"files": sorted(str(file.relative_to(output)) for file in kept_files(output))}
    for file in kept_files(output):
        name = str(file.relative_to(output))
        if file.suffix == ".safetensors":
            found[name] = load_file(file)
        elif file.suffix == ".pt":
            state = torch.load(file, weights_only=True)
            # The log's length depends on how wall times were printed; the log itself is compared without them.
            found[name] = without(state, {"monitors"})
        elif file.name not in ("manifest.json", "recipe.json"):
            found[name] = file.read_bytes()
    return found


def kept_files(output: Path) -> Iterator[Path]:
    """Files of the model, the adapters and the checkpoints, each under its own name only."""
    for file in sorted(output.rglob("*")):
        inside = file.relative_to(output).parts
        if file.is_file() and inside[0] in ("model", "adapters", "checkpoints") and inside[1] not in ("best", "last"):
            yield file
    yield output / "finished.json"


def without(state: Any, names: set[str]) -> Any:
    """A state without some keys of its first level."""
    return {key: value for key, value in state.items() if key not in names} if isinstance(state, Mapping) else state


def same(left: Any, right: Any) -> bool:
    """Equal to the last bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def log_lines(output: Path) -> list[dict[str, Any]]:
    """The log without what was measured."""
    lines = (json.loads(line) for line in (output / "log.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_randomness_matters(output: Path) -> None:
    """The generator must have been drawn from in training, or a resume that forgets it would pass."""
    ranks = torch.load(output / "checkpoints" / "last" / "ranks.pt", weights_only=True)
    assert not torch.equal(ranks[0]["random"]["torch"], torch.Generator().manual_seed(0).get_state())
