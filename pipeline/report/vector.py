"""Plots of many small marks, written as SVG directly: each mark tells its value when pointed at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from pipeline.report.plots import layer_color

_WIDTH = 324.0  # of a panel, in the units of its view box; a phone's width
_LEFT, _RIGHT, _TOP, _BOTTOM = 34.0, 6.0, 22.0, 30.0
_LOWEST = 1e-3  # variances below it are shown as nothing
_GROUPS = 4  # colours of a scatter plot


def heat_map(name: str, rows: Sequence[Sequence[float]], unit: str) -> str:
    """One cell a (layer, dimension), darker for more, on a logarithmic scale from 0.001 to 1."""
    columns = max(len(row) for row in rows)
    width = (_WIDTH - _LEFT - _RIGHT) / columns
    height = min(max(150.0 / len(rows), 8.0), 26.0)
    bottom = _TOP + height * len(rows)
    parts = [_text(0, 12, unit, "start")]
    for y, row in enumerate(rows):
        top = _TOP + y * height
        if y % -(-len(rows) // 12) == 0:
            parts.append(_text(_LEFT - 6, top + height / 2 + 3.5, str(y), "end"))
        for x, value in enumerate(row):
            parts.append(
                f'<rect x="{_LEFT + x * width:.1f}" y="{top:.1f}" width="{width:.2f}" '
                f'height="{height:.2f}" fill="var(--valid)" fill-opacity="{_strength(value):.2f}" '
                f'stroke="var(--grid)" stroke-width=".5"><title>layer {y}, dimension {x}: '
                f"{value:.3g}</title></rect>"
            )
    step = -(-columns // 8)
    for x in range(0, columns, step):
        parts.append(_text(_LEFT + (x + 0.5) * width, bottom + 13, str(x), "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 26, "dimension", "middle"))
    parts.append(_text(9, (_TOP + bottom) / 2, "layer", "middle", turned=True))
    parts += _scale()
    return _svg(name, bottom + _BOTTOM, parts)


def scatter(name: str, points: Sequence[Sequence[float]], shares: Sequence[float]) -> str:
    """Documents on two axes, coloured by their length; `shares` of the variance name the axes."""
    xs, ys, lengths = zip(*points, strict=True)
    height = 250.0
    left, right, top, bottom = 18.0, 6.0, 24.0, 20.0
    # One scale for both axes: distances are what there is to see.
    span = max(max(xs) - min(xs), (max(ys) - min(ys)) * (_WIDTH - left) / (height - top - bottom))
    scale = (_WIDTH - left - right - 8) / (span or 1.0)
    middle_x, middle_y = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    center_x, center_y = (left + _WIDTH - right) / 2, (top + height - bottom) / 2
    bounds = _quantiles(sorted(lengths))
    parts = []
    for x, y, length in points:
        group = sum(length > bound for bound in bounds)
        parts.append(
            f'<circle cx="{center_x + (x - middle_x) * scale:.1f}" '
            f'cy="{center_y - (y - middle_y) * scale:.1f}" r="2.2" fill-opacity=".65" '
            f'fill="{layer_color(group, _GROUPS)}"><title>{int(length)} tokens</title></circle>'
        )
    parts.append(_text(center_x, height - 5, f"{100 * shares[0]:.0f}% of the variance", "middle"))
    parts.append(_text(10, center_y, f"{100 * shares[1]:.0f}%", "middle", turned=True))
    names = ["tokens"] + [f"≤ {int(bound)}" for bound in bounds] + ["more"]
    place = 4.0
    parts.append(_text(place, 12, names[0], "start"))
    place += 46
    for group, label in enumerate(names[1:]):
        color = layer_color(group, _GROUPS)
        parts.append(f'<circle cx="{place:.0f}" cy="8.5" r="3.5" fill="{color}"/>')
        parts.append(_text(place + 7, 12, label, "start"))
        place += 22 + 7 * len(label)
    return _svg(name, height, parts)


def _quantiles(ordered: Sequence[float]) -> list[float]:
    """The bounds between groups of like size, without those that repeat."""
    places = [len(ordered) * group // _GROUPS for group in range(1, _GROUPS)]
    return sorted({ordered[place] for place in places})


def _strength(value: float) -> float:
    if value <= _LOWEST:
        return 0.0
    return min(math.log(value / _LOWEST) / math.log(1 / _LOWEST), 1.0)


def _scale() -> list[str]:
    """What the strengths of a heat map mean, at its upper right."""
    parts = []
    for index, value in enumerate((0.001, 0.01, 0.1, 1.0)):
        x = _WIDTH - _RIGHT - 152 + 40 * index
        parts.append(
            f'<rect x="{x:.0f}" y="4" width="10" height="10" fill="var(--valid)" '
            f'fill-opacity="{_strength(value):.2f}" stroke="var(--grid)" stroke-width=".5"/>'
        )
        parts.append(_text(x + 13, 12, f"{value:g}", "start"))
    return parts


def _text(x: float, y: float, text: str, anchor: str, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="9.5" text-anchor="{anchor}" '
        f'fill="var(--muted)"{turn}>{escape(text)}</text>'
    )


def _svg(name: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg role="img" aria-label="{escape(name)}" viewBox="0 0 {_WIDTH:.0f} {height:.0f}">'
        f"{''.join(parts)}</svg>"
    )
