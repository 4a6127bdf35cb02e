"""The page's content as HTML with plots, and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline.evaluation.figures import shown
from pipeline.evaluation.table import TEXT_LABELS
from pipeline.progress import duration
from pipeline.report.costs import costs_panel
from pipeline.report.front import front_panel
from pipeline.report.plots import (
    MARKED_POINTS,
    VALID,
    Line,
    Series,
    bar_panel,
    curve_panel,
    layer_color,
    layers_panel,
    line_panel,
    samples_panel,
)
from pipeline.report.vector import heat_map, scatter

_FOLDER = Path(__file__).parent
_NATS = "nats a document"
# key of a curve -> title and unit
_PANELS = {
    "loss": ("Loss", f"{_NATS}, with β and free bits"),
    "negative_elbo": ("−ELBO", _NATS),
    "reconstruction_nll": ("Reconstruction NLL", _NATS),
    "kl": ("KL", f"{_NATS}, summed over layers"),
    "bag_of_words_nll": ("Bag of words", f"{_NATS}, without its weight"),
    "beta": ("β", "weight of the KL in the loss"),
    "learning_rate": ("Learning rate", ""),
    "tokens_per_s": ("Throughput", "tokens/s"),
    "grad_norm": ("Gradient norm", "before clipping"),
}
_SECTIONS = {
    "figures": "Figures",
    "training": "Training",
    "latents": "Latents",
    "samples": "Samples",
    "answers": "Answers",
    "reconstructions": "Reconstructions",
    "interpolations": "Interpolations",
    "throughput": "Throughput",
    "data": "Data",
    "config": "Config",
    "versions": "Versions",
}
_TABLE_COLUMNS = 7
_OPTIONAL = ("answers", "interpolations")  # sections that are left out when empty
_ACTIVE_COLORS = {"0.01": VALID, "0.2": layer_color(2, 4)}


def as_html(page: dict[str, Any]) -> str:
    """The page as one HTML file that refers to nothing outside of it."""
    panels = _PANELS_OF[page["kind"]]
    form = template(f"{page['kind']}.html.jinja", autoescape=True)
    return form.render(page=page, **panels(page), **_tables(page))


def as_markdown(page: dict[str, Any]) -> str:
    """The page as Markdown, without plots."""
    text = template(f"{page['kind']}.md.jinja", autoescape=False).render(page=page, **_tables(page))
    return re.sub(r"\n{3,}", "\n\n", text)


def _run_panels(page: dict[str, Any]) -> dict[str, Any]:
    return {
        "training_panels": list(_training_panels(page)),
        "latent_panels": list(_latents(page)),
        "sections": [
            (name, title)
            for name, title in _SECTIONS.items()
            if name not in _OPTIONAL or page[name]
        ],
    }


def _tables(page: dict[str, Any]) -> dict[str, Any]:
    """What both forms of a page ask for beside its content."""
    generation = page.get("generation") or {}
    titles = {"samples": "samples", "real": "real documents"}
    columns = [(titles[name], generation[name]) for name in titles if name in generation]
    return {"text_labels": TEXT_LABELS, "generation_columns": columns}


def _columns(columns: list[Any]) -> list[list[Any]]:
    """A wide table's columns, as many to each of several as a page of text has room for."""
    return [
        columns[start : start + _TABLE_COLUMNS] for start in range(0, len(columns), _TABLE_COLUMNS)
    ]


def template(name: str, autoescape: bool) -> jinja2.Template:
    """A template of this folder, with the filters that pages share."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "plain": plain,
        "md": escaped_markdown,
        "duration": duration,
        "moment": moment,
        "slice_columns": _columns,
    }
    environment.globals["shown"] = shown
    return environment.get_template(name)


def plain(value: Any) -> str:
    """A setting or a count, as a person reads it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return str(value)


def moment(text: str) -> str:
    """A recorded time, as a person reads it."""
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M %Z}"


def escaped_markdown(value: Any) -> str:
    """Text that Markdown shows as it is, on one line; escaped no more than it must be."""
    text = re.sub(r"\s+", " ", plain(value))
    text = re.sub(r"[\\`*\[\]<>|~&]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
    return re.sub(r"^( ?\d*)([#+=.)-])(?=[#=-]*(?: |$))", r"\1\\\2", text)  # lists, headings, rules


def _training_panels(page: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key, (title, unit) in _PANELS.items():
        curve = page["curves"].get(key)
        if key == "beta" and curve:  # a schedule: the same in validation
            curve = {kind: points for kind, points in curve.items() if kind == "train"}
        if curve:
            # Markup: our own plot of numbers; no text of the run is in it.
            yield {"title": title, "svg": Markup(curve_panel(title, curve, unit))}


def _latents(page: dict[str, Any]) -> Iterator[dict[str, Any]]:
    curves, layers = page["kl_per_layer_over_time"], page["kl_per_layer"]
    if curves:
        svg = layers_panel("KL of each layer over time", curves, "nats")
        yield _panel("KL of each layer over time", svg)
    if layers:
        colors = [layer_color(layer["layer"], len(layers)) for layer in layers]
        values = [layer["value"] for layer in layers]
        errors = [layer["error"] for layer in layers]
        svg = bar_panel("KL of each layer", [("KL", values, colors)], _NATS, errors)
        yield _panel("KL of each layer, evaluated", svg)
    if page["active_units"]:
        groups = [
            (f"above {bound}", counts, _ACTIVE_COLORS.get(bound, VALID))
            for bound, counts in page["active_units"].items()
        ]
        size = page["latent_size"]
        svg = bar_panel("Active units of each layer", groups, f"of {size}, by variance", None, size)
        yield _panel("Active units of each layer", svg)
    if page["posterior_mean_variance"]:
        title = "Variance of posterior means"
        yield _panel(title, heat_map(title, page["posterior_mean_variance"], "variance"))
    if page["probe"]:
        rows = page["probe"]["layers"]
        colors = [layer_color(layer, len(rows)) for layer in range(len(rows))]
        values = [("swapped", [row["token_kl"] for row in rows], colors)]
        errors = [row["token_kl_error"] for row in rows]
        title = "Latent of one layer swapped"
        yield _panel(title, bar_panel(title, values, "nats a token", errors))
    if page["iw_curve"]:
        points = page["iw_curve"]["points"]
        series = Series(
            "",
            [point["samples"] for point in points],
            [point["gap"] for point in points],
            [point["gap_error"] for point in points],
        )
        title = "Gap between −ELBO and IW-NLL"
        yield _panel(title, samples_panel(title, [series], _NATS))
    if page["projection"]:
        title = "Latent space"
        drawn = scatter(title, page["projection"]["points"], page["projection"]["shares"])
        yield _panel(title, drawn)


def _panel(title: str, svg: str) -> dict[str, Any]:
    return {"title": title, "svg": Markup(svg)}


def _comparison_panels(page: dict[str, Any]) -> dict[str, Any]:
    """Curves of all runs over each other, and their latents side by side."""
    count = len(page["runs"])
    colors = [layer_color(index, max(count, 2)) for index in range(count)]
    letters = [run["letter"] for run in page["runs"]]
    training = []
    for key, (title, unit) in _PANELS.items():
        curves = page["curves"].get(key, {})
        lines = [
            Line(letter, curves[letter], color, 1.6, len(curves[letter]) <= MARKED_POINTS)
            for letter, color in zip(letters, colors, strict=True)
            if letter in curves
        ]
        if lines:
            training.append(_panel(title, line_panel(title, lines, unit)))
    latents = []
    for key, title, unit in (
        ("kl_per_layer", "KL of each layer", _NATS),
        ("active_units", "Active units of each layer, above 0.01", ""),
    ):
        rows = [(letter, page[key][letter]) for letter in letters if page[key].get(letter)]
        longest = max((len(values) for _, values in rows), default=0)
        groups = [
            (letter, [*values, *[0.0] * (longest - len(values))], colors[letters.index(letter)])
            for letter, values in rows
        ]
        if groups:
            latents.append(_panel(title, bar_panel(title, groups, unit)))
    series = [
        Series(
            letter,
            [point["samples"] for point in page["iw_curve"][letter]["points"]],
            [point["gap"] for point in page["iw_curve"][letter]["points"]],
            [point["gap_error"] for point in page["iw_curve"][letter]["points"]],
            color,
        )
        for letter, color in zip(letters, colors, strict=True)
        if page["iw_curve"].get(letter)
    ]
    if series:
        title = "Gap between −ELBO and IW-NLL"
        latents.append(_panel(title, samples_panel(title, series, _NATS)))
    return {"training_panels": training, "latent_panels": latents, "colors": colors}


def _study_panels(page: dict[str, Any]) -> dict[str, Any]:
    return {"study_panels": [_panel("IW-NLL against MI", front_panel(page["systems"]))]}


def _studies_panels(page: dict[str, Any]) -> dict[str, Any]:
    return {
        "costs_panels": [
            _panel(f"IW-NLL less that of {base}", costs_panel(page, base))
            for base in page["against"]
        ]
    }


_PANELS_OF = {
    "run": _run_panels,
    "comparison": _comparison_panels,
    "study": _study_panels,
    "studies": _studies_panels,
}
