"""`triptych check` on copies of other projects' files: each planted fault gives file, line and exit status 1."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.command_server import CommandServer, Outcome
from tests.recipes.tiny_recipes import Files, contrastive, tune, write_files, write_recipe

SHARED = Path(os.environ.get("TRIPTYCH_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real files are not in {SHARED}; set TRIPTYCH_SHARED")

MAX_LENGTH = 600
Row = dict[str, Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("files"))


def check(server: CommandServer, folder: Path, recipe: dict[str, Any]) -> Outcome:
    """`triptych check` on a recipe whose paths are relative to `folder`."""
    write_recipe(folder / "recipe.yaml", {"output": "run", **recipe})
    return server.run(["check", "recipe.yaml"], folder / "check.log")


def conversations(files: Files, data: dict[str, Any]) -> dict[str, Any]:
    """A recipe of one data set."""
    recipe = {**copy.deepcopy(tune(files)), "max_length": MAX_LENGTH, "data": [data]}
    recipe["model"]["language"]["config"]["max_position_embeddings"] = 2048
    del recipe["evaluation"]
    return {**recipe, "train": {}}


def turns(row: Row) -> tuple[list[dict[str, str]], str, str]:
    """Turns of a row, and what their role and text are called."""
    return (row["messages"], "role", "content") if "messages" in row else (row["conversations"], "from", "value")


def set_images(row: Row, names: list[str]) -> None:
    """Pictures of a row in either layout."""
    row.update({"images": names} if "messages" in row else {"image": names})


def picture_of(row: Row) -> str:
    """The row's first picture."""
    return str(row["images"][0] if "messages" in row else row["image"])


def empty_answer(row: Row, root: Path) -> None:
    items, _, text = turns(row)
    items[1][text] = ""


def swap_roles(row: Row, root: Path) -> None:
    items, role, _ = turns(row)
    items[0][role], items[1][role] = items[1][role], items[0][role]


def make_long(row: Row, root: Path) -> None:
    items, _, text = turns(row)
    items[1][text] = "long " * 200


def write_text(row: Row, root: Path) -> None:
    (root / "fake.jpg").write_text("not a picture")
    set_images(row, ["fake.jpg"])


def leave_root(row: Row, root: Path) -> None:
    shutil.copyfile(root / picture_of(row), root.parent / "outside.jpg")
    set_images(row, ["../outside.jpg"])


FAULTS: dict[str, tuple[Callable[[Row, Path], None], str]] = {
    "missing image": (lambda row, root: set_images(row, ["absent.jpg"]), "`absent.jpg` is not a file"),
    "too many placeholders": (lambda row, root: set_images(row, []), "1 placeholder (<image>) for 0 pictures"),
    "too few placeholders": (lambda row, root: set_images(row, [picture_of(row)] * 2), "for 2 pictures"),
    "an image that is text": (write_text, "is not a picture in a known format"),
    "empty answer": (empty_answer, "is an empty answer"),
    "wrong role order": (swap_roles, "is expected"),
    "over-long row": (make_long, f"{MAX_LENGTH}"),
    "path that leaves the root": (leave_root, "leaves the image root"),
    "duplicate id": (lambda row, root: row.update(id="twice"), "id `twice` was already used in"),
}
"""Fault -> how to plant it into a row with one picture, and what the report says."""


def demo(source: str, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Clean rows of one picture each, their pictures copied into `folder/root`, and their data set configuration."""
    root = folder / "root"
    if source == "llamafactory":
        shutil.copytree(SHARED / "llamafactory/mllm_demo_data", root / "mllm_demo_data", copy_function=shutil.copyfile)
        rows = json.loads((SHARED / "llamafactory/mllm_demo.json").read_text())
        return [row for row in rows if len(row["images"]) == 1], {"format": "messages"}
    shutil.copytree(SHARED / "qwen3vl/demo/images", root / "demo/images", copy_function=shutil.copyfile)
    return json.loads((SHARED / "qwen3vl/demo/single_images.json").read_text()), {"format": "llava"}


@pytest.mark.requirement("A-1", "A-6")
@pytest.mark.parametrize("source", ["llamafactory", "qwen3vl"])
def test_every_planted_fault_is_found(source: str, server: CommandServer, files: Files, tmp_path: Path) -> None:
    rows, config = demo(source, tmp_path)
    rows[0]["id"] = "twice"
    lines = [json.dumps(rows[0])]
    for change, _ in FAULTS.values():
        row = json.loads(json.dumps(rows[1]))
        change(row, tmp_path / "root")
        lines.append(json.dumps(row))
    broken = len(lines) + 1
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, lines[0][:-20], json.dumps(rows[2])]))
    result = check(server, tmp_path, conversations(files, {**config, "path": "rows.jsonl", "images": "root"}))
    assert result.status == 1, result.log
    found = findings(result.log)
    for line, (fault, (_, said)) in enumerate(FAULTS.items(), 2):
        assert said in found[f"rows.jsonl:{line}"], fault
    assert "not valid JSON" in found[f"rows.jsonl:{broken}"]
    assert set(found) == {f"rows.jsonl:{line}" for line in range(2, broken + 1)}, "the two clean rows are left alone"
    assert f"{broken - 1} errors" in result.log


@pytest.mark.requirement("A-1")
@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_is_enough_for_exit_status_1(fault: str, server: CommandServer, files: Files, tmp_path: Path) -> None:
    rows, config = demo("llamafactory", tmp_path)
    rows[0]["id"] = "twice"
    FAULTS[fault][0](rows[1], tmp_path / "root")
    text = json.dumps(rows, indent=2)
    (tmp_path / "rows.json").write_text(text)
    result = check(server, tmp_path, conversations(files, {**config, "path": "rows.json", "images": "root"}))
    assert result.status == 1, result.log
    starts = [number for number, line in enumerate(text.split("\n"), 1) if line == "  {"]
    ((place, message),) = findings(result.log).items()
    assert place == f"rows.json:{starts[1]}" and FAULTS[fault][1] in message


@pytest.mark.requirement("A-1")
@pytest.mark.parametrize(
    "data",
    [
        {"format": "messages", "path": "llamafactory/mllm_demo.json"},
        {"format": "llava", "path": "qwen3vl/demo/single_images.json", "images": "qwen3vl"},
        {"format": "captions", "path": "torchtitan/cc12m-train-0000.tar"},
    ],
    ids=lambda data: data["path"],
)
def test_clean_files_pass(data: dict[str, Any], server: CommandServer, files: Files, tmp_path: Path) -> None:
    place = {key: str(SHARED / data[key]) for key in ("path", "images") if key in data}
    if data["format"] == "captions":
        recipe = {**contrastive(files), "data": [{**data, **place}], "truncate_captions": True}
    else:
        recipe = {**conversations(files, {**data, **place}), "max_length": 2048}
    result = check(server, tmp_path, recipe)
    assert result.status == 0, result.log
    assert "0 errors" in result.log


def test_a_file_that_is_no_json_is_reported_with_its_position(
    server: CommandServer, files: Files, tmp_path: Path
) -> None:
    shutil.copyfile(SHARED / "internvl/debug_mpo.json", tmp_path / "debug_mpo.json")
    result = check(server, tmp_path, conversations(files, {"format": "llava", "path": "debug_mpo.json"}))
    assert result.status == 1, result.log
    ((place, message),) = findings(result.log).items()
    assert place == "debug_mpo.json:16" and "line 16, column 1" in message


def findings(log: str) -> dict[str, str]:
    """`file:line` -> message of each error in a printed report."""
    lines = (line.removeprefix("error: ").partition(": ") for line in log.splitlines() if line.startswith("error: "))
    return {place: message for place, _, message in lines}
