"""Plots of the benchmark as SVG files, drawn with the geometry of the run reports (`triptych.web.charts`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from triptych.web.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Line, Points, Tick, ticks

COLOURS = ("#2563eb", "#c2410c")
"""Ours, the peer's."""
_INK, _LINE, _GROUND = "#475569", "#cbd5e1", "#ffffff"
_NAMES, _BAR, _END = 190, 22, 70
"""Width of the names, height of a bar, room for the number behind it."""


def bars(title: str, rows: Sequence[tuple[str, float, float | None]]) -> str:
    """A bar for each ratio, from 0, with a line at 1: to its right we are ahead.

    Args:
        title: of the plot.
        rows: (name, ratio, target or None); a target is a short mark across its bar.
    """
    width = WIDTH + _NAMES
    top, bottom = TOP + 8, TOP + 8 + _BAR * len(rows)
    most = max([1.0, *(max(ratio, target or 0.0) for _, ratio, target in rows)])

    def place(value: float) -> float:
        return round(_NAMES + value / most * (width - _NAMES - _END), 1)

    parts = [_text(8, 16, title, "start", bold=True)]
    for value in ticks(0, most, 6):
        parts += [_stroke(place(value), place(value), top, bottom), _text(place(value), bottom + 16, f"{value:g}")]
    for number, (name, ratio, target) in enumerate(rows):
        start = top + _BAR * number
        colour = COLOURS[ratio < 1]
        parts.append(
            f'<rect x="{_NAMES}" y="{start + 4}" width="{place(ratio) - _NAMES:.1f}" height="{_BAR - 8}" '
            f'fill="{colour}"/>'
        )
        parts.append(_text(_NAMES - 8, start + 15, name, "end"))
        if target is not None:
            parts.append(_stroke(place(target), place(target), start + 1, start + _BAR - 1, _INK, 2))
        parts.append(_text(max(place(ratio), place(target or 0.0)) + 6, start + 15, f"{ratio:.2f}", "start"))
    parts.append(_stroke(place(1), place(1), top, bottom, _INK, 1.5))
    return _page(width, bottom + 26, title, parts)


def curves(title: str, x_name: str, charts: Sequence[Chart]) -> str:
    """Charts side by side, ours and the peer's curve in each.

    Args:
        title: for readers who cannot see it.
        x_name: what grows to the right.
        charts: as `chart` makes them.
    """
    parts = []
    for number, item in enumerate(charts):
        parts.append(f'<g transform="translate({number * WIDTH} 0)">')
        parts.append(_text(LEFT, 14, item.title, "start", bold=True))
        for tick in item.y_ticks:
            parts += [_stroke(LEFT, WIDTH - RIGHT, tick.at, tick.at), _text(LEFT - 6, tick.at + 4, tick.label, "end")]
        parts += [_text(tick.at, HEIGHT - 8, tick.label) for tick in item.x_ticks]
        for line in item.lines:
            parts.append(f'<path d="{line.path}" fill="none" stroke="{COLOURS[line.colour]}" stroke-width="2"/>')
        for line in item.lines:
            parts.append(_text(WIDTH - RIGHT - 40 * line.colour, 14, line.name, "end", COLOURS[line.colour], bold=True))
        parts += [_text(WIDTH - RIGHT, HEIGHT + 6, x_name, "end"), "</g>"]
    return _page(WIDTH * len(charts), HEIGHT + 14, title, parts)


def chart(title: str, series: Sequence[tuple[str, Points]]) -> Chart:
    """Curves of positive numbers over positive numbers, both axes from 0, a mark under each measured point."""
    values = [value for _, points in series for _, value in points]
    places = sorted({x for _, points in series for x, _ in points})
    x_most, y_most = places[-1], max(values) * 1.05

    def x(value: float) -> float:
        return round(LEFT + value / x_most * (WIDTH - LEFT - RIGHT - 12), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - value / y_most * (HEIGHT - TOP - BOTTOM), 1)

    lines = [
        Line(name, "M" + " L".join(f"{x(left)} {y(value)}" for left, value in points), number)
        for number, (name, points) in enumerate(series)
    ]
    marks: list[Tick] = []
    for place in places:
        if not marks or x(place) - marks[-1].at > 24:  # or the labels would overlap
            marks.append(Tick(x(place), f"{place:g}"))
    return Chart(
        title, tuple(lines), tuple(marks), tuple(Tick(y(value), f"{value:g}") for value in ticks(0, y_most, 5))
    )


def _page(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    assert math.isfinite(width) and math.isfinite(height)
    # A ground of its own: pages that show it may be dark.
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(title)}" font-family="system-ui, sans-serif" '
        f'font-size="11">\n<path d="M0 0H{width:g}V{height:g}H0z" fill="{_GROUND}"/>'
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = _INK, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(text)}</text>'


def _stroke(x1: float, x2: float, y1: float, y2: float, colour: str = _LINE, width: float = 1) -> str:
    return f'<line x1="{x1:g}" x2="{x2:g}" y1="{y1:g}" y2="{y2:g}" stroke="{colour}" stroke-width="{width:g}"/>'
