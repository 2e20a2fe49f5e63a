"""`micro_batch: auto`: which rows are measured, what a run does with what was found, and what it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.commands import Outcome, read_recipe, triptych, write
from tests.recipes.test_kill_resume import log_lines, outcome, same
from tests.recipes.tiny_recipes import RECIPES, Files, tune
from triptych.core.types import Batch, ImageReference
from triptych.data.packing import Budget
from triptych.data.sharing import Tree, plant
from triptych.engine.lock import locked
from triptych.engine.micro_batch import Meter
from triptych.stages.build import Built
from triptych.stages.micro_batch import Passes, fill, sample_rows
from triptych.stages.tune import build_tune

MIB = 2**20
LONGEST = 97
"""Tokens of the longest row."""


def recipe(files: Files, folder: Path, kind: str = "language", **changes: Any) -> Path:
    values = RECIPES[kind](files)
    values["loader"].pop("micro_batch")
    loader = {"global_batch": 8, "micro_batch": "auto", "epochs": None, "steps": 3}
    train = {"save_every": 1, "keep_last": 5}
    file = folder / f"{kind}.yaml"
    return write(file, {"output": str(folder / "run"), **values}, **{"loader": loader, "train": train, **changes})


@pytest.fixture
def a_mebibyte_a_token(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Passes are run, but their memory is 1 MiB for each token; the tokens of each pass."""
    passes: list[int] = []
    measure: Callable[..., int] = Meter.measure

    def known(meter: Meter, *batches: Batch) -> int:
        measure(meter, *batches)
        passes.extend(int(batch.lengths.sum()) for batch in batches)
        return max(passes[-len(batches) :]) * MIB

    monkeypatch.setattr(Meter, "measure", known)
    return passes


def train(*arguments: object) -> Outcome:
    done = triptych("train", *arguments)
    assert done.status == 0, done.err
    return done


def said(done: Outcome) -> list[str]:
    return [line for line in done.out.splitlines() if line.startswith("micro-batch")]


@pytest.mark.parametrize("kind", ["language", "dpo"])
def test_a_run_equals_one_that_is_told_the_number(
    kind: str, files: Files, tmp_path: Path, a_mebibyte_a_token: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe(files, tmp_path, kind)
    done = train(file, "train.memory_limit=300 MiB")
    found = json.loads((tmp_path / "run" / "micro_batch.json").read_text())
    assert found["added"] + found["reserved"] <= 300 * MIB and found["limit"] == 300 * MIB
    assert 200 < found["tokens"] < 300 or kind == "dpo"
    assert found["measured"][-1][1] == found["added"]
    (line,) = said(done)
    assert f"{found['tokens']} tokens, measured to add {found['added'] / MIB:.3g} MiB" in line
    facts = json.loads((tmp_path / "run" / "facts.json").read_text())
    assert facts["micro_batch"] == found and "tuning" in facts

    def refuse(meter: Meter, *batches: Batch) -> int:
        raise AssertionError("nothing is to be measured")

    monkeypatch.setattr(Meter, "measure", refuse)
    told = tmp_path / "told"
    number = f"loader.micro_batch_tokens={found['tokens']}"
    assert said(train(file, "loader.micro_batch=null", number, f"output={told}")) == []
    auto = outcome(tmp_path / "run")
    for name, value in outcome(told).items():
        assert same(value, auto[name]), name
    assert log_lines(told) == log_lines(tmp_path / "run")


@pytest.mark.requirement("G-7")
def test_a_run_resumes_with_the_number_it_began_with(
    files: Files, tmp_path: Path, a_mebibyte_a_token: list[int]
) -> None:
    file, run = recipe(files, tmp_path), tmp_path / "run"
    train(file, "train.memory_limit=200 MiB")
    whole, number = outcome(run), json.loads((run / "micro_batch.json").read_text())["tokens"]
    for step in (2, 3):
        shutil.rmtree(run / "checkpoints" / f"step-0000000{step}")
    (run / "finished.json").unlink()
    a_mebibyte_a_token.clear()
    # Another limit changes nothing: the run goes on as it began.
    done = train(file, "train.memory_limit=0.5")
    assert said(done) == [f"micro-batch: {number} tokens, as measured when the run began"]
    assert not a_mebibyte_a_token and "start at step 1 of 3" in done.out
    again = outcome(run)
    assert all(same(value, again[name]) for name, value in whole.items())

    (run / "micro_batch.json").unlink()
    refused = triptych("train", file, "lr=0.5")
    assert refused.status == 1 and "the recipe changed: lr" in refused.err and not a_mebibyte_a_token
    again = train(file, "train.memory_limit=200 MiB")
    assert "micro_batch.json is gone: measured again" in again.out and "measured to add" in said(again)[0]

    a_mebibyte_a_token.clear()
    shutil.rmtree(run / "checkpoints")
    assert "measured to add" in said(train(file, "train.memory_limit=0.5"))[0]  # it begins anew
    assert a_mebibyte_a_token


def test_a_limit_above_what_there_is_is_said(files: Files, tmp_path: Path, a_mebibyte_a_token: list[int]) -> None:
    done = train(recipe(files, tmp_path), "train.memory_limit=900 TiB")
    assert "train.memory_limit: 900 TiB is more than is available, which is the limit instead" in done.out
    found = json.loads((tmp_path / "run" / "micro_batch.json").read_text())
    assert found["limit"] == found["available"]


def test_a_run_that_another_process_has_begun_keeps_its_number(
    files: Files, tmp_path: Path, a_mebibyte_a_token: list[int]
) -> None:
    file = recipe(files, tmp_path)
    with locked(tmp_path / "run"):
        done = triptych("train", file)
    assert done.status == 1 and "another process" in done.err
    assert not a_mebibyte_a_token and not (tmp_path / "run" / "micro_batch.json").exists()


def test_no_pass_computes_more_than_twice_the_one_before(
    files: Files, tmp_path: Path, a_mebibyte_a_token: list[int]
) -> None:
    train(recipe(files, tmp_path))
    found = json.loads((tmp_path / "run" / "micro_batch.json").read_text())
    largest = a_mebibyte_a_token[0]
    for tokens in a_mebibyte_a_token:
        assert tokens <= 2 * largest
        largest = max(largest, tokens)
    assert found["tokens"] == 8 * LONGEST == largest  # a whole step in one micro-batch


@pytest.mark.parametrize("limit", ["500 kB", "40 MiB"])
def test_a_row_that_does_not_fit_stops_the_run_before_it_begins(
    limit: str, files: Files, tmp_path: Path, a_mebibyte_a_token: list[int]
) -> None:
    done = triptych("train", recipe(files, tmp_path), f"train.memory_limit={limit}")
    assert done.status == 1 and "Traceback" not in done.err
    text = " ".join(done.err.split())
    assert "train.memory_limit: a micro-batch of one row of" in text
    assert "gradients 0.266 MiB, optimizer state 0.531 MiB; `train.memory_limit` allows" in text
    assert "method: lora" in text and "activation_checkpointing" in text and "max_length" in text
    assert not (tmp_path / "run" / "micro_batch.json").exists()
    if limit == "500 kB":
        assert "needs 0.797 MiB and more" in text and a_mebibyte_a_token == []
    else:
        assert "(measured)" in text and max(a_mebibyte_a_token) <= 2 * min(a_mebibyte_a_token)


def test_what_only_looks_says_that_it_will_be_measured(files: Files, tmp_path: Path) -> None:
    file = recipe(files, tmp_path)
    for arguments in (("check", file), ("train", file, "--dry-run")):
        done = triptych(*arguments)
        assert done.status == 0, done.err
        assert said(done) == ["micro-batch: auto, its tokens are measured when the run begins"]
    assert not (tmp_path / "run").exists()


def build(files: Files, folder: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> tuple[Any, Built]:
    values = tune(files)
    if rows is not None:
        (folder / "rows.json").write_text(json.dumps(rows))
        values["data"] = [{**values["data"][0], "path": str(folder / "rows.json")}]
    loader = {"global_batch": 8, "micro_batch": "auto", "epochs": 1, **changes}
    made = read_recipe(write(folder / "recipe.yaml", {"output": str(folder / "run"), **values}, loader=loader))
    return made, build_tune(made)


def turns(answer: str, picture: str | None = None, question: str = "what?") -> dict[str, Any]:
    mark = "" if picture is None else "<image>\n"
    row = [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"conversations": row} if picture is None else {"image": picture, "conversations": row}


def pictures(files: Files) -> list[str]:
    return [row["image"] for row in json.loads((files.data / "train.json").read_text())]


def test_rows_come_longest_first_with_the_trees_of_the_first_step(files: Files, tmp_path: Path) -> None:
    first, second = pictures(files)[:2]
    rows = [turns("a" * count, first, question=f"{count}?") for count in range(3, 9)]
    rows += [turns("b", second), turns("c" * 30)]
    made, built = build(files, tmp_path, rows, rows_per_picture=8)
    found, trees = sample_rows(made.loader, built, share=8)
    assert len(found) == len(rows)
    assert [row.tokens for row in found] == sorted((row.tokens for row in found), reverse=True)
    assert [len(tree.examples) for tree in trees] == [6]


def test_rows_that_cannot_be_used_are_left_out(files: Files, tmp_path: Path) -> None:
    whole = files.data / "pictures" / pictures(files)[0]
    broken = files.data / "pictures" / f"broken-{tmp_path.name}.png"
    noise = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(broken)
    broken.write_bytes(broken.read_bytes()[:1500])
    rows = [turns("a", whole.name), turns("b" * 40, broken.name), turns("c" * 1000), turns("d")]
    made, built = build(files, tmp_path, rows, on_bad_row="skip")
    assert len(sample_rows(made.loader, built, share=8)[0]) == 2
    made, built = build(files, tmp_path, rows)
    assert len(sample_rows(made.loader, built, share=8)[0]) == 3  # the run itself stops at the broken picture


class Seen:
    """Stands for a meter: keeps the batches, of which each adds as many bytes as it is told."""

    def __init__(self, added: Callable[[Batch], int] = lambda batch: 0) -> None:
        self.batches: list[Batch] = []
        self.added = added

    def measure(self, *batches: Batch) -> int:
        self.batches += batches
        return max(map(self.added, batches))


def tree(files: Files, folder: Path, *rows: dict[str, Any]) -> list[Tree]:
    _, built = build(files, folder, list(rows))
    return [plant(built.encode(built.datasets[0].sample(number))) for number in range(len(rows))]


class Table:
    """Pictures in a table."""

    def read_picture(self, cell: tuple[int | str, ...]) -> bytes:
        return b"picture %d" % cell[0]


def test_copies_of_a_row_share_nothing(files: Files, tmp_path: Path) -> None:
    pictured, plain = tree(files, tmp_path, turns("a", pictures(files)[0]), turns("b"))
    (example,) = pictured.examples
    stored = replace(example, images=(ImageReference(rows=Table(), cell=(4, "image")),))
    for row in (pictured, plain, plant(stored)):
        seen = Seen()
        Passes(seen, [row], [], Budget(8)).measure([row] * 3)  # type: ignore[arg-type]
        (batch,) = seen.batches
        assert batch.num_examples == 3 and batch.tree_index.tolist() == [0, 1, 2]
        assert len(batch.images) == 3 * len(row.examples[0].images)
    assert {image.data for image in batch.images} == {b"picture 4"}


def test_a_budget_is_filled_up_with_shorter_rows(files: Files, tmp_path: Path) -> None:
    long, middle, short = tree(files, tmp_path, turns("a" * 40), turns("b" * 20), turns("c"))
    rows = [long, middle, short]

    def lengths(tokens: int, examples: int | None = None, kind: Tree = long) -> list[int]:
        return [row.tokens for row in fill(kind, rows, Budget(examples, tokens))]

    assert lengths(long.tokens) == [long.tokens]
    assert lengths(2 * long.tokens + middle.tokens) == [long.tokens, long.tokens, middle.tokens]
    assert lengths(long.tokens + short.tokens + 1) == [long.tokens, short.tokens]
    assert lengths(10 * long.tokens, examples=3) == [long.tokens] * 3
    assert lengths(long.tokens, kind=short)[0] == short.tokens
    padded = fill(long, rows, Budget(tokens=2 * long.tokens + middle.tokens, packed=False))
    assert [row.tokens for row in padded] == [long.tokens] * 2  # a third row would be padded to the longest


def test_every_kind_that_may_be_the_worst_is_measured_until_it_is_not(files: Files, tmp_path: Path) -> None:
    long, dense, supervised = tree(
        files, tmp_path, turns("a", question="q" * 60), turns("b", pictures(files)[0]), turns("c" * 40)
    )

    def by_picture(batch: Batch) -> int:
        return 200 * MIB * len(batch.images)

    seen = Seen(by_picture)
    passes = Passes(seen, [long, supervised, dense], [], Budget(50))  # type: ignore[arg-type]
    point = passes.measure_budget(long.tokens)
    assert len(seen.batches) == 3 and point.added == by_picture(seen.batches[1])
    seen.batches.clear()
    assert passes.measure_budget(3 * long.tokens).added > point.added and len(seen.batches) == 3
    seen.batches.clear()
    passes.measure_budget(6 * long.tokens)
    assert [len(batch.images) > 1 for batch in seen.batches] == [True]
    seen.batches.clear()
    assert passes.measure_step(6 * long.tokens) == by_picture(seen.batches[0]) and len(seen.batches) == 2
