"""The picture of a study: IW-NLL against MI, a mark a system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.plots import INK, MUTED, TRAIN, VALID, drawn_panel

_TITLE = "IW-NLL against MI"
_LINE = 0.055  # height of a label, as a share of the axis


def front_panel(systems: Sequence[Mapping[str, Any]]) -> str:
    """The systems as an SVG element; those that no other beats in both are joined by a line."""
    points = [_marked(row) for row in systems]

    def draw(axes: Any) -> None:
        front = sorted(
            (x, y) for (x, y), row in zip(points, systems, strict=True) if row["on_front"]
        )
        axes.plot(*zip(*front, strict=True), color=VALID, linewidth=1.2, zorder=1)
        for (x, y), row in zip(points, systems, strict=True):
            cells, color = row["cells"], VALID if row["on_front"] else TRAIN
            axes.errorbar(
                x,
                y,
                xerr=cells["mutual_information"]["spread"],
                yerr=cells["iw_nll"]["spread"],
                color=color,
                marker="o",
                markersize=4,
                elinewidth=0.8,
                capsize=1.5,
            )
        axes.margins(x=0.22, y=0.12)
        _label(axes, points, [row["name"] for row in systems])
        axes.set_xlabel("MI, nats")
        axes.set_title("IW-NLL, nats a document: lower right is better", loc="left", fontsize=9)
        axes.title.set_color(MUTED)

    return drawn_panel(_TITLE, draw)


def _marked(row: Mapping[str, Any]) -> tuple[float, float]:
    cells = row["cells"]
    return cells["mutual_information"]["value"] or 0.0, cells["iw_nll"]["value"]


def _label(axes: Any, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Names at the right of their marks, from below upwards, none over another."""
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    step, at = _LINE * (high - low), low
    for (x, y), name in sorted(zip(points, names, strict=True), key=lambda each: each[0][1]):
        at = max(y, at + step)
        axes.annotate(
            name,
            (x, y),
            (x + 0.02 * (right - left), at),
            fontsize=7,
            color=INK,
            verticalalignment="center",
            annotation_clip=False,
        )
    if at + step > high:
        axes.set_ylim(low, at + step)
