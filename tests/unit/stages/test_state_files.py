"""What a run keeps for those that resume it: whole or not at all, and named where it is neither."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tests.commands import triptych, write
from tests.recipes.tiny_recipes import Files, tune
from triptych.core.errors import CheckpointError
from triptych.stages.state_files import read_state, write_state, write_whole


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run" / "state.json"
    assert read_state(file, ("tokens",)) is None
    write_state(file, {"tokens": 512, "measured": [[1, 2]]})
    write_state(file, {"tokens": 256})
    assert read_state(file, ("tokens",)) == {"tokens": 256}
    assert [item.name for item in file.parent.iterdir()] == ["state.json"]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: half a `finished.json` would count as a finished run."""
    file = tmp_path / "finished.json"
    write_whole(file, "as it was")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_whole(file, "longer than there is room for")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_text() == "as it was"
    assert [item.name for item in tmp_path.iterdir()] == ["finished.json"]


@pytest.mark.parametrize("content", ["{", "[1]", "", b"\xff\xfe{", '{"keeps": true}'])
def test_a_damaged_file_is_named(content: str | bytes, tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError) as caught:
        read_state(file, ("keeps", "reason"))
    (problem,) = caught.value.problems
    assert problem.file == str(file) and "damaged" in problem.message and "delete it" in str(problem.remedy)


def test_a_run_that_cannot_read_what_it_decided_says_so(files: Files, tmp_path: Path) -> None:
    values = {"output": str(tmp_path / "run"), **tune(files)}
    file = write(tmp_path / "recipe.yaml", values, train={"save_every": 2})
    assert triptych("train", file).status == 0
    decision = tmp_path / "run" / "features.json"
    for damaged in ("{keeps", "{}"):
        decision.write_text(damaged)
        refused = triptych("train", file)
        assert refused.status == 1 and str(decision) in refused.err and "delete it" in refused.err
    decision.unlink()
    assert triptych("train", file).status == 0
