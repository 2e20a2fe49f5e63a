"""The command line: help, version, errors for people, and quiet libraries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import triptych, write
from tests.recipes.tiny_recipes import tune, write_files
from triptych import __version__
from triptych.stages import pipeline

COMMANDS = ("train", "check", "eval", "chat", "export", "scenes", "doctor")


def test_help_is_a_table_of_contents() -> None:
    done = triptych("--help")
    assert done.status == 0
    assert all(f" {command} " in done.out for command in COMMANDS)
    bare = triptych()
    assert "Usage" in bare.out + bare.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    done = triptych(command, "--help")
    assert done.status == 0 and "Usage" in done.out and f"triptych {command}" in done.out


def test_version() -> None:
    assert triptych("--version").out.strip() == __version__


def test_help_and_version_import_no_heavy_library() -> None:
    program = (
        "import sys\nfrom triptych import cli\nsys.argv = ['triptych', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("values", "overrides", "said"),
    [
        (None, (), ("recipe not found", "recipe.yml", "did you mean `recipe.yaml`?")),
        ({"stage": "tuen"}, (), ("`stage: tuen` is not a stage", "recipe.yaml:1", "did you mean `tune`?")),
        ({}, (), ("`stage` is required",)),
        ({"loder": {}}, (), ("unknown key `loder`", "did you mean `loader`")),
        ({}, ("stage=tune", "loader.mirco_batch=2"), ("`mirco_batch`", "did you mean `micro_batch`", "command line")),
        ({}, ("nonsense",), ("override `nonsense` is not `key.sub=value`",)),
    ],
)
@pytest.mark.parametrize("command", ["train", "check"])
def test_wrong_recipes_are_explained(
    command: str, values: dict[str, object] | None, overrides: tuple[str, ...], said: tuple[str, ...], tmp_path: Path
) -> None:
    base = {"stage": "tune", "output": "x", "loader": {"global_batch": 1, "micro_batch": 1, "steps": 1}}
    if values == {} or values is None:
        base = {"output": "x"}
    file = write(tmp_path / "recipe.yaml", {**base, **(values or {})})
    done = triptych(command, file.with_suffix(".yml") if values is None else file, *overrides)
    assert done.status == 1 and "Traceback" not in done.err
    assert done.err.startswith("error: ")
    assert all(text in done.err for text in said), done.err


def test_missing_data_and_models_are_explained(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    values = {"output": str(tmp_path / "run"), **tune(files)}
    recipe = write(tmp_path / "recipe.yaml", values)
    done = triptych("train", recipe, f"data.0.path={tmp_path}/nope.json")
    assert done.status == 1 and "nope.json" in done.err and done.err.startswith("error: ")
    done = triptych("train", recipe, f"model.language.tokenizer={tmp_path}/nope")
    assert done.status == 1 and "nope" in done.err and done.err.startswith("error: ")
    (files.data / "pictures" / "train-000-cat.png").unlink()
    done = triptych("train", recipe)
    assert done.status == 1 and done.err.startswith("error: ")
    assert "train-000-cat.png" in done.err and "train.json:" in done.err


def test_scenes_writes_the_embedded_data_set_once(tmp_path: Path) -> None:
    done = triptych("scenes", tmp_path / "data", "-n", "20", "--test", "2")
    assert done.status == 0 and "wrote 20 training scenes" in done.out
    assert {"train.json", "test.json", "pictures"} <= {item.name for item in (tmp_path / "data").iterdir()}
    again = triptych("scenes", tmp_path / "data", "-n", "20", "--test", "2")
    assert again.status == 0 and "exactly this already" in again.out


def test_a_fresh_process_prints_nothing_but_our_own(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml", {"output": str(tmp_path / "run"), **tune(write_files(tmp_path))})
    arguments = [sys.executable, "-m", "triptych.cli", "train", str(recipe), "loader.epochs=0.3", "loader.steps=null"]
    environment = {**os.environ, "COLUMNS": "80", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert re.sub(r"pictures are decoded by \d threads \(.*\)\n", "", done.stderr) == ""
    assert max(len(line) for line in done.stdout.splitlines() if "step-" not in line and "model:" not in line) <= 100


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command resumes a training run"),
        (OSError(28, "No space left on device", "run/log.jsonl"), 1, "error: [Errno 28] No space left on device"),
    ],
)
def test_ends_that_are_nobody_s_mistake(
    error: BaseException, status: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "train", stop)
    done = triptych("train", tmp_path / "recipe.yaml")
    assert done.status == status and done.err.splitlines()[-1].startswith(said) and "Traceback" not in done.err


def test_a_wrong_command_line_is_status_2() -> None:
    for arguments in (["trian"], ["eval", "a", "b", "--limit", "0"], ["check", "a", "--samples", "-1"]):
        done = triptych(*arguments)
        assert done.status == 2 and "Traceback" not in done.err


def test_an_override_of_an_unknown_section_is_blamed_on_the_command_line(tmp_path: Path) -> None:
    file = write(tmp_path / "recipe.yaml", {"stage": "tune", "output": "x"})
    done = triptych("train", file, "lodaer.seed=3")
    assert "command line: lodaer: unknown key `lodaer`" in done.err and "did you mean `loader`?" in done.err
