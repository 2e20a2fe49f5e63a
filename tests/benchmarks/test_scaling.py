"""Both ways compute the same at every kind of point, and one number varies at a time."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from benchmarks.models import TINY
from benchmarks.row import Setting
from benchmarks.scaling import Point, axes, build


def test_every_axis_varies_one_number_from_the_same_base() -> None:
    base = asdict(Point())
    values: dict[str, list[object]] = {}
    for axis, point in axes():
        assert {**asdict(point), axis: base[axis]} == base
        values.setdefault(axis, []).append(asdict(point)[axis])
    assert values["image_tokens"][0] == 64 and values["image_tokens"][-1] == 2304
    assert values["branches"][0] == 1 and values["branches"][-1] == 16
    assert len(values["batch"]) >= 3 and len(values["model"]) >= 2
    assert all(base[axis] in found for axis, found in values.items())


@pytest.mark.parametrize("point", [Point(branches=1), Point(image_tokens=64, branches=3, batch=2)])
def test_both_ways_have_the_same_loss_and_gradients(point: Point) -> None:
    row = build(point, Setting(), scale=TINY)
    found = []
    for way in (row.ours, row.peer):
        way.model.zero_grad()
        loss = way.run()
        found.append((loss, [p.grad.clone() for p in way.model.parameters() if p.grad is not None]))
    (loss, ours), (other, peer) = found
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
    total = torch.stack([gradient.norm() for gradient in peer]).norm()
    assert len(ours) == len(peer) > 0
    for left, right in zip(ours, peer, strict=True):
        assert (left - right).norm() <= 1e-4 * right.norm() + 1e-6 * total
