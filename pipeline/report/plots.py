"""Plots as SVG that is part of the page: its text is text, its colours are the page's.

matplotlib draws with placeholder colours; each becomes a CSS variable, so that one SVG reads in
light and in dark. A panel is as wide as a phone, so that its text is never scaled down.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

INK, MUTED, GRID, TRAIN, VALID = "#010101", "#020202", "#030303", "#040404", "#050505"
_CSS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    TRAIN: "var(--train)",
    VALID: "var(--valid)",
}
# From the first layer to the last; each stands out from white and from near-black.
_LAYER_RAMP = ((0x3B, 0x7D, 0xD8), (0x2A, 0x9D, 0x8F), (0xD9, 0x8E, 0x04), (0xD6, 0x4B, 0x5F))
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "della",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.color": GRID,
    "ytick.labelcolor": MUTED,
    "ytick.left": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.1,
}
_SIZE = (4.5, 2.7)  # inches; 324 points wide
_NAMED_LAYERS = 4  # as many as a legend has room for beside the unit
MARKED_POINTS = 40  # of a curve with fewer, each point gets a dot


@dataclass(frozen=True)
class Line:
    """One curve of a panel."""

    label: str  # "" leaves it out of the legend
    points: Sequence[Sequence[float]]  # [x, y]
    color: str
    width: float = 1.6
    marked: bool = False


@dataclass(frozen=True)
class Series:
    """Figures by number of importance samples."""

    label: str
    samples: Sequence[int]
    values: Sequence[float]
    errors: Sequence[float | None]
    color: str = VALID


def curve_panel(name: str, curve: dict[str, list[list[float]]], unit: str) -> str:
    """A figure over optimizer steps, in training and in validation."""
    lines = []
    if "train" in curve:
        lines.append(Line("train", curve["train"], TRAIN, 1.3))
    if "valid" in curve:
        marked = len(curve["valid"]) <= MARKED_POINTS
        lines.append(Line("valid", curve["valid"], VALID, 1.8, marked))
    return line_panel(name, lines, unit)


def layers_panel(name: str, curves: list[list[list[float]]], unit: str) -> str:
    """One curve a layer over optimizer steps; of many layers, some are named."""
    count = len(curves)
    named = {round(i * (count - 1) / (_NAMED_LAYERS - 1)) for i in range(_NAMED_LAYERS)}
    lines = [
        Line(f"layer {layer}" if layer in named else "", points, layer_color(layer, count), 1.5)
        for layer, points in enumerate(curves)
    ]
    return line_panel(name, lines, unit)


def line_panel(name: str, lines: Sequence[Line], unit: str) -> str:
    """Curves over optimizer steps as an SVG element; `name` is its accessible name."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        for line in lines:
            x, y = zip(*line.points, strict=True)
            marker = {"marker": "o", "markersize": 3} if line.marked or len(x) == 1 else {}
            axes.plot(
                x, y, color=line.color, linewidth=line.width, label=line.label or "_", **marker
            )
        axes.margins(x=0.02, y=0.08)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep="", places=None))
        _finish_y(axes, unit)
        if len(lines) > 1:
            _legend(axes)
        return _svg(figure, name)


def samples_panel(name: str, series: Sequence[Series], unit: str) -> str:
    """Figures over the number of importance samples, with their errors; logarithmic in it."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        for one in series:
            axes.errorbar(
                one.samples,
                one.values,
                yerr=None if any(error is None for error in one.errors) else one.errors,
                color=one.color,
                linewidth=1.6,
                marker="o",
                markersize=3.5,
                elinewidth=1,
                capsize=2.5,
                label=one.label or "_",
            )
        axes.set_xscale("log")
        axes.minorticks_off()
        ticks = sorted({count for one in series for count in one.samples})
        axes.set_xticks(ticks, [f"{count:,}" for count in ticks])
        axes.set_xlabel("importance samples a document")
        _finish_y(axes, unit)
        if len(series) > 1:
            _legend(axes)
        return _svg(figure, name)


def bar_panel(
    name: str,
    groups: Sequence[tuple[str, Sequence[float], str | Sequence[str]]],
    unit: str,
    errors: Sequence[float | None] | None = None,
    ceiling: float | None = None,
) -> str:
    """Bars by layer; groups (label, a value a layer, color) stand side by side."""
    with mpl.rc_context(_STYLE):
        count = len(groups[0][1])
        figure, axes = _axes()
        width = 0.72 / len(groups)
        for index, (label, values, color) in enumerate(groups):
            offset = (index - (len(groups) - 1) / 2) * width
            places = [layer + offset for layer in range(count)]
            axes.bar(places, values, width * 0.92, color=color, label=label)
            if errors is not None and all(error is not None for error in errors):
                axes.errorbar(
                    places, values, yerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2
                )
        if ceiling is not None:
            axes.axhline(ceiling, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            axes.set_ylim(0, ceiling * 1.12)
        axes.set_xlabel("layer")
        axes.set_xlim(-0.6, count - 0.4)
        axes.set_xticks(range(0, count, -(-count // 16)))
        _finish_y(axes, unit)
        if len(groups) > 1:
            _legend(axes)
        return _svg(figure, name)


def drawn_panel(name: str, draw: Callable[[Any], None]) -> str:
    """A panel of any kind: `draw` puts it on matplotlib axes, in the page's style and colours."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes()
        draw(axes)
        return _svg(figure, name)


def standalone(svg: str) -> str:
    """A panel as a file of its own, with the colours of a light page."""
    root = svg.index(">") + 1
    head = svg[:root].replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    style = (
        "<style>svg{--muted:#5c6370;--grid:#d9dce1;--train:#8a8f98;--valid:#3b7dd8;"
        "color:#16181d;background:#fff;font-family:sans-serif}</style>"
    )
    return head + style + svg[root:] + "\n"


def layer_color(layer: int, num_layers: int) -> str:
    """The colour of a layer, between the ends of the ramp."""
    place = (layer / max(num_layers - 1, 1)) * (len(_LAYER_RAMP) - 1)
    left = min(int(place), len(_LAYER_RAMP) - 2)
    share = place - left
    pairs = zip(_LAYER_RAMP[left], _LAYER_RAMP[left + 1], strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def _axes() -> tuple[Figure, Any]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _finish_y(axes: Any, unit: str) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.set_title(unit, loc="left", fontsize=9, color=MUTED)


def _legend(axes: Any) -> None:
    """Above the plot at its right end, where no curve runs."""
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 0.98),
        ncols=_NAMED_LAYERS,
        borderaxespad=0.1,
        columnspacing=0.9,
        handletextpad=0.4,
    )


def _svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element to put into a page."""
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # A page holds many figures, and an id must be its alone.
    prefix = re.sub(r"\W+", "-", name).lower()
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'xlink:href="#', f'href="#{prefix}-', text)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # inline in HTML they mean nothing
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    for placeholder, css in _CSS.items():
        text = text.replace(placeholder, css)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(name)}"', 1)
