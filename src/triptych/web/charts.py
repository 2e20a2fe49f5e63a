"""Line charts as plain geometry, drawn by the page's template as inline SVG: no scripts, no files beside the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 22, 26
"""Margins around the plot, in units of the drawing."""


@dataclass(frozen=True)
class Line:
    """One curve."""

    name: str
    path: str
    """SVG path data."""
    colour: int
    """Number of the page's palette."""
    is_faint: bool = False


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Band:
    """A stretch of the horizontal axis."""

    left: float
    width: float
    label: str


@dataclass(frozen=True)
class Chart:
    """What the template draws."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    bands: tuple[Band, ...] = ()


Points = Sequence[tuple[float, float]]


def smooth(points: Points, window: int) -> list[tuple[float, float]]:
    """The mean of each value and the `window - 1` before it."""
    values = [value for _, value in points]
    total, result = 0.0, []
    for index, (x, value) in enumerate(points):
        total += value
        if index >= window:
            total -= values[index - window]
        result.append((x, total / min(index + 1, window)))
    return result


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within a range: steps of 1, 2 or 5 times a power of ten, at most `most` steps.

    Raises:
        ValueError: the range is empty or not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"no range: {low} to {high}")
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def shares(title: str, series: Sequence[tuple[str, Points]]) -> Chart:
    """Curves of numbers from 0 to 1, shown in percent, over steps."""
    last = max(x for _, points in series for x, _ in points)
    lines = [
        Line(name, _path(points, (0, last), (0, 1)), number) for number, (name, points) in enumerate(series) if points
    ]
    y_ticks = tuple(Tick(_y(value, (0, 1)), f"{value:.0%}") for value in (0, 0.25, 0.5, 0.75, 1))
    return Chart(title, tuple(lines), _x_ticks(last), y_ticks)


def losses(title: str, stages: Sequence[tuple[str, Points]]) -> Chart:
    """The losses of stages one after another, each in a band of its own and on its own scale.

    Args:
        title: of the chart.
        stages: (name, (step from 1, loss) points); the losses are finite.
    """
    total = sum(points[-1][0] for _, points in stages)
    lines, bands, marks = [], [], []
    start = 0.0
    for number, (name, points) in enumerate(stages):
        even = smooth(points, max(1, len(points) // 30))
        values = [value for _, value in even]
        low, high = min(0.0, *values), max(values) * 1.05 or 1.0
        moved = [(x + start, y) for x, y in points]
        lines.append(Line("", _path(moved, (0, total), (low, high)), number, is_faint=True))
        lines.append(Line(name, _path([(x + start, y) for x, y in even], (0, total), (low, high)), number))
        left = _x(start, (0, total))
        end = _x(start + points[-1][0], (0, total))
        bands.append(Band(left, end - left, f"{name} {values[0]:.2f} → {values[-1]:.2f}"))
        marks.append(Tick(end, f"{points[-1][0]:.0f}"))
        start += points[-1][0]
    return Chart(title, tuple(lines), tuple(marks), (), tuple(bands))


def _x_ticks(last: float) -> tuple[Tick, ...]:
    return tuple(Tick(_x(value, (0, last)), f"{value:g}") for value in ticks(0, last, 5)) if last > 0 else ()


def _x(value: float, limits: tuple[float, float]) -> float:
    share = (value - limits[0]) / ((limits[1] - limits[0]) or 1)
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)


def _y(value: float, limits: tuple[float, float]) -> float:
    share = min(1.0, max(0.0, (value - limits[0]) / ((limits[1] - limits[0]) or 1)))
    return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def _path(points: Points, x_limits: tuple[float, float], y_limits: tuple[float, float]) -> str:
    return "M" + " L".join(f"{_x(x, x_limits)} {_y(y, y_limits)}" for x, y in points)
