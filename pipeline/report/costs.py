"""The picture of several studies: what each system costs, a mark a study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.report.plots import INK, MUTED, drawn_panel, layer_color

_ROW, _AROUND = 0.24, 1.0  # inches of height: of a system, and of the rest
_SHORT_TITLE = 14  # letters; three such have room beside each other
_BAND = 0.5  # of a row's height, the part over which its studies are spread


def costs_panel(page: Mapping[str, Any], base: str) -> str:
    """IW-NLL less that of `base` in percent, a row a system, as an SVG element.

    A bar is one standard error over documents on either side.
    """
    rows = [row for row in page["systems"] if row["name"] != base]
    titles = [study["title"] for study in page["studies"]]
    colors = [layer_color(number, max(len(titles), 2)) for number in range(len(titles))]

    def draw(axes: Any) -> None:
        axes.figure.set_size_inches(4.5, _AROUND + _ROW * len(rows))
        for number, (title, color) in enumerate(zip(titles, colors, strict=True)):
            shift = _BAND * ((number + 0.5) / len(titles) - 0.5)
            marks = [
                (at + shift, found["differences"][base])
                for at, row in enumerate(rows)
                if (found := row["on"][number]) and found["differences"].get(base)
            ]
            axes.errorbar(
                [difference["percent"] for _, difference in marks],
                [place for place, _ in marks],
                xerr=[difference["percent_error"] or 0.0 for _, difference in marks],
                fmt="o",
                color=color,
                markersize=3.5,
                elinewidth=1,
                label=title,
            )
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.tick_params(axis="y", labelcolor=INK, labelsize=8)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        # Of the figure, whose width long names of systems leave as it is.
        axes.figure.supxlabel(
            f"IW-NLL less that of {base}, percent: lower is better",
            fontsize=axes.xaxis.label.get_size(),
            color=axes.xaxis.label.get_color(),
        )
        columns = 3 if max(map(len, titles)) <= _SHORT_TITLE else 1
        axes.figure.legend(loc="outside upper center", ncols=columns)

    return drawn_panel(f"IW-NLL against {base}", draw)
