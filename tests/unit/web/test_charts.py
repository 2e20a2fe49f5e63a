"""Geometry of the charts, by hand."""

from __future__ import annotations

import math

import pytest

from triptych.web.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, losses, shares, smooth, ticks


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0, 240, 5) == [0, 50, 100, 150, 200]
    assert ticks(0.13, 0.57, 4) == [0.2, 0.4]
    assert ticks(-3, 3, 3) == [-2, 0, 2]
    for low, high in ((1.0, 1.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="no range"):
            ticks(low, high, 5)


def test_smoothing_is_the_mean_of_the_last_values() -> None:
    assert smooth([(1, 4.0), (2, 2.0), (3, 0.0), (4, 4.0)], 2) == [(1, 4.0), (2, 3.0), (3, 1.0), (4, 2.0)]
    assert smooth([], 3) == []


def test_shares_fill_the_plot() -> None:
    chart = shares("accuracy", [("naming", [(0, 0.0), (10, 1.0)]), ("none", [])])
    (line,) = chart.lines
    assert line.path == f"M{LEFT} {HEIGHT - BOTTOM}.0 L{WIDTH - RIGHT}.0 {TOP}.0".replace(f"{LEFT} ", f"{LEFT}.0 ")
    assert [tick.label for tick in chart.y_ticks] == ["0%", "25%", "50%", "75%", "100%"]
    assert [tick.label for tick in chart.x_ticks] == ["0", "2", "4", "6", "8", "10"]


def test_losses_stand_one_after_another_on_their_own_scales() -> None:
    chart = losses("loss", [("towers", [(1, 4.0), (30, 2.0)]), ("tune", [(1, 400.0), (10, 100.0)])])
    assert [band.label for band in chart.bands] == ["towers 4.00 → 2.00", "tune 400.00 → 100.00"]
    assert chart.bands[0].left == LEFT and chart.bands[1].left == chart.bands[0].left + chart.bands[0].width
    assert chart.bands[0].width == pytest.approx(3 * chart.bands[1].width, rel=0.01)
    assert [line.is_faint for line in chart.lines] == [True, False] * 2
    heights = [line.path.split("L")[0].split()[1] for line in chart.lines[1::2]]
    assert heights[0] == heights[1]  # both start at the top of their own scale


def test_no_losses_is_an_empty_chart() -> None:
    assert losses("loss", []).lines == ()
