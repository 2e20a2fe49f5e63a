"""Gradient statistics by hand, and who is named when a run stops."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.unit.engine.toy_run import toy_batch
from triptych.core.errors import TrainingError
from triptych.core.types import ParameterGroup, Window
from triptych.engine.diagnosis import GradientReach, empty_window_error, gradient_statistics, non_finite_error
from triptych.engine.window import NonFinite, WindowResult


def parameter(gradient: list[float] | None) -> nn.Parameter:
    item = nn.Parameter(torch.zeros(len(gradient or [0.0])))
    item.grad = None if gradient is None else torch.tensor(gradient)
    return item


def result(loss: float = 1.0, non_finite: tuple[NonFinite, ...] = (), weight: float = 1.0) -> WindowResult:
    return WindowResult(
        loss=loss,
        terms={"nll": loss},
        weights={"nll": weight},
        metrics={},
        empty_terms=(),
        samples=4,
        supervised_tokens=16,
        tokens=20,
        skipped_rows=0,
        data_seconds=0.0,
        non_finite=non_finite,
    )


@pytest.mark.requirement("F-9", "F-10")
def test_statistics_by_hand() -> None:
    found = gradient_statistics(
        {
            "pair": parameter([3.0, -4.0]),
            "single": parameter([2.0]),
            "none": parameter(None),
            "broken": parameter([1.0, math.nan, -math.inf, 3.0]),
            "lost": parameter([math.nan]),
        }
    )

    pair = found["pair"]
    assert (pair.mean, pair.std, pair.max_abs, pair.norm, pair.num_non_finite) == (-0.5, 3.5, 4.0, 5.0, 0)
    assert (found["single"].std, found["single"].max_abs) == (0.0, 2.0)
    assert "none" not in found
    broken = found["broken"]
    assert (broken.mean, broken.std, broken.max_abs, broken.num_non_finite) == (2.0, 1.0, 3.0, 2)
    assert found["lost"].num_non_finite == 1
    assert gradient_statistics({}) == {}


def test_all_samples_are_named_where_the_bad_micro_batch_is_not_known(tmp_path: Path) -> None:
    groups = [
        ParameterGroup("a", "vision", {"a.0": parameter([1.0]), "a.1": parameter([math.inf])}, 1.0, 0.0),
        ParameterGroup("b", "language", {"b.0": parameter([1.0])}, 1.0, 0.0),
    ]
    window = Window(5, 1.0, (toy_batch([0, 1]), toy_batch([6])))

    error = non_finite_error(5, window, result(), groups, tmp_path / "new")

    assert [(item.file, item.line) for item in error.problems[1:]] == [("toy.jsonl", line) for line in (1, 2, 7)]
    assert "step 6: loss is 1 but gradients are not finite" in error.problems[0].message
    assert "a (1 of 2), first a.1" in error.problems[0].message
    note = json.loads((tmp_path / "new" / "non-finite.json").read_text())
    assert list(note["gradients"]) == ["a.1"]


def test_a_long_window_names_twenty_and_the_note_has_all(tmp_path: Path) -> None:
    window = Window(0, 1.0, (toy_batch(list(range(30))),))
    bad = NonFinite(0, 0, {"nll": math.nan}, window.batches[0].origins)

    error = non_finite_error(0, window, result(math.nan, (bad,)), [], tmp_path)

    assert len(error.problems) == 1 + 20 + 1
    assert error.problems[-1].message == "and 10 more samples, see non-finite.json"
    assert len(json.loads((tmp_path / "non-finite.json").read_text())["samples"]) == 30


def test_a_window_without_weight_names_its_samples_once_each() -> None:
    padding = replace(toy_batch([5]), is_padding=True)
    error = empty_window_error(2, Window(2, 1.0, (toy_batch([0, 3]), toy_batch([3]), padding)))

    assert "step 3: every term of the loss has weight 0 in this window of 2 samples" in error.problems[0].message
    assert [(item.file, item.line) for item in error.problems[1:]] == [("toy.jsonl", 1), ("toy.jsonl", 4)]


def group(*names: str, name: str = "vision") -> ParameterGroup:
    return ParameterGroup(name, name, {item: parameter(None) for item in names}, 1.0, 0.0)


WINDOW = Window(0, 1.0, (toy_batch([0]),))


def test_text_alone_may_wait_for_pictures_but_not_for_ever() -> None:
    reached = {"tower": False}

    def check(parameters: object) -> list[str]:
        return [name for name, value in reached.items() if not value]

    reach = GradientReach(check, [group("tower")])
    for step in range(5):
        reach.look(step, WINDOW, result())
    reached["tower"] = True
    reach.look(5, WINDOW, result())
    reached["tower"] = False
    for step in range(6, 40):
        reach.look(step, WINDOW, result())  # it was reached once
    reach.finish()

    reach = GradientReach(check, [group("tower")])
    with pytest.raises(TrainingError, match="no gradient reaches 1 trainable parameters"):
        for step in range(40):
            last = step
            reach.look(step, WINDOW, result())
    assert last == GradientReach.PATIENCE - 1


def test_at_the_end_the_unreached_are_named_by_group_with_one_remedy() -> None:
    many = [f"block.{number}" for number in range(25)]
    groups = [group("patch", *many), group("head", name="language"), group("a", "b", name="connector")]
    reach = GradientReach(lambda parameters: [name for name in parameters if name not in ("patch", "head")], groups)
    reach.look(0, WINDOW, result())

    with pytest.raises(TrainingError) as caught:
        reach.finish()
    headline, vision, connector = caught.value.problems
    assert headline.key == "tuning" and "27 trainable parameters" in headline.message
    assert vision.message.startswith("group vision: 25 of 26: block.0, ") and vision.message.endswith(" and 5 more")
    assert connector.message == "group connector: 2 of 2: a, b"
    assert str(caught.value).count("->") == 1


def test_a_window_without_anything_supervised_tells_nothing() -> None:
    reach = GradientReach(lambda parameters: list(parameters), [group("a")])
    for step in range(40):
        reach.look(step, WINDOW, result(weight=0.0))
