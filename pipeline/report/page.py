"""The content of a run's page, as plain values: `report.json` is this, the other forms show it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from typing import Any

from pipeline.artifact import Artifact, versions
from pipeline.errors import UserError
from pipeline.evaluation.figures import LABELS, collapse
from pipeline.storage import Location

MAX_POINTS = 240  # of one curve: more than a screen's width of a panel would only add bytes

Row = dict[str, Any]


def build_page(title: str, run: Artifact, figures: Artifact | None) -> dict[str, Any]:
    """Gather what the page shows.

    Args:
        title: the heading.
        run: a train stage's artifact; its folder holds `metrics.jsonl`.
        figures: an evaluate stage's artifact, or None when the run was not evaluated.

    Raises:
        UserError: if an artifact is of another stage, or `metrics.jsonl` is damaged.
    """
    _require_stage(run, "train", "run")
    if figures is not None:
        _require_stage(figures, "evaluate", "figures")
    rows = read_metrics(run.folder / "metrics.jsonl")
    measured = figures.figures if figures is not None else {}
    return {
        "title": title,
        "run": _record(run),
        "evaluation": _record(figures) if figures is not None else None,
        "split": figures.spec.get("split") if figures is not None else None,
        "verdict": _verdict(measured),
        "headline": _headline(measured) if measured else _last_validation(rows),
        "iw_samples": measured.get("iw_samples"),
        "counts": {k: measured[k] for k in _COUNTS if k in measured},
        "curves": {key: curve for key in _CURVES if (curve := _curve(rows, key))},
        "kl_per_layer_over_time": _layers_over_time(rows),
        "kl_per_layer": _layers(measured),
        "active_units": measured.get("active_units"),
        "latent_size": measured.get("latent_size"),
        "samples": measured.get("samples", []),
        "reconstructions": measured.get("reconstructions", []),
        "throughput": _throughput(rows, run),
        "training": _scalars(run.figures),
        "config": {
            "train": flatten(run.spec),
            "evaluate": flatten(figures.spec) if figures is not None else {},
        },
        "data": _data(run),
        "versions": {"run": run.versions, "report": versions()},
    }


_COUNTS = ("num_documents", "num_tokens", "num_words")
_CURVES = (
    "loss",
    "negative_elbo",
    "reconstruction_nll",
    "kl",
    "beta",
    "learning_rate",
    "tokens_per_s",
    "grad_norm",
)


def read_metrics(file: Location) -> list[Row]:
    """Read the rows of `metrics.jsonl`, a JSON object a line; none when the file is not there.

    A last line without its end is left out: a killed run may leave one. Where a resumed run has
    logged a step again, the later row stands.

    Raises:
        UserError: if another line is no JSON object.
    """
    if not file.is_file():
        return []
    lines = file.read_bytes().decode("utf-8", errors="replace").split("\n")
    rows: dict[tuple[Any, Any], Row] = {}
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or "step" not in row:
            raise UserError(
                f"{file}, line {number}, should hold a JSON object with a step but does not: the "
                "file was damaged or edited; restore it, or delete the line."
            )
        key = (row.get("kind"), row["step"])
        rows.pop(key, None)
        rows[key] = row
    return sorted(rows.values(), key=lambda row: row["step"])


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one table of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _require_stage(artifact: Artifact, stage: str, key: str) -> None:
    if artifact.stage != stage:
        raise UserError(
            f"{key}={artifact.folder} is the artifact of a {artifact.stage} stage: expected one of "
            f"the {stage} stage, whose content the page shows; give the folder that it printed."
        )


def _record(artifact: Artifact) -> dict[str, Any]:
    names = ("fingerprint", "status", "started_at", "finished_at", "took_s", "inputs")
    return {name: getattr(artifact, name) for name in names}


def _verdict(figures: Mapping[str, Any]) -> dict[str, Any] | None:
    """Whether the latents live, in a sentence."""
    if "kl" not in figures or "active_units" not in figures:
        return None
    sentence = collapse(dict(figures))
    if sentence is not None:
        return {"collapsed": True, "sentence": sentence}
    active = figures["active_units"]["0.01"]
    size = figures.get("latent_size", 0) * len(active)
    return {
        "collapsed": False,
        "sentence": (
            f"The latents live: they carry {figures['kl']:.3g} nats a document, and {sum(active)} "
            f"of {size} dimensions vary with it."
        ),
    }


def _headline(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    errors = figures.get("standard_errors", {})
    return [
        {
            "name": name,
            "title": label.title,
            "unit": label.unit,
            "meaning": label.meaning,
            "value": figures[name],
            "error": errors.get(name),
        }
        for name, label in LABELS.items()
        if name in figures
    ]


def _last_validation(rows: list[Row]) -> list[dict[str, Any]]:
    """Without an evaluation: what the last validation of the training measured."""
    valid = [row for row in rows if row.get("kind") == "valid"]
    if not valid:
        return []
    return [
        {
            "name": name,
            "title": f"{label.title}, valid",
            "unit": label.unit,
            "meaning": f"at step {valid[-1]['step']}: {label.meaning}",
            "value": valid[-1][name],
            "error": None,
        }
        for name, label in LABELS.items()
        if valid[-1].get(name) is not None
    ]


def _curve(rows: list[Row], key: str) -> dict[str, list[list[float]]]:
    """Points [step, value] by kind of row, thinned by averaging neighbours."""
    curve = {}
    for kind in ("train", "valid"):
        points = [
            [float(row["step"]), float(row[key])]
            for row in rows
            if row.get("kind") == kind and isinstance(row.get(key), int | float)
        ]
        if points:
            curve[kind] = thin(points)
    return curve


def thin(points: list[list[float]]) -> list[list[float]]:
    """At most MAX_POINTS points: means of equally many neighbours."""
    width = -(-len(points) // MAX_POINTS)
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [[statistics.fmean(column) for column in zip(*g, strict=True)] for g in groups]


def _layers_over_time(rows: list[Row]) -> list[list[list[float]]]:
    """One curve a layer; of the validation when it has more than two points."""
    for kind, least in (("valid", 3), ("train", 1)):
        chosen = [row for row in rows if row.get("kind") == kind and row.get("kl_per_layer")]
        if len(chosen) >= least:
            layers = len(chosen[0]["kl_per_layer"])
            return [
                thin([[float(row["step"]), float(row["kl_per_layer"][layer])] for row in chosen])
                for layer in range(layers)
            ]
    return []


def _layers(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    values = figures.get("kl_per_layer", [])
    errors = figures.get("standard_errors", {}).get("kl_per_layer", [None] * len(values))
    return [
        {"layer": layer, "value": value, "error": error}
        for layer, (value, error) in enumerate(zip(values, errors, strict=True))
    ]


def _throughput(rows: list[Row], run: Artifact) -> dict[str, Any]:
    """Median and best rate of the training, after its first row, which holds the warm-up."""
    train = [row for row in rows if row.get("kind") == "train"]
    rates = [row["tokens_per_s"] for row in train[1:] or train if row.get("tokens_per_s")]
    found: dict[str, Any] = {"took_s": run.took_s, "steps": train[-1]["step"] if train else None}
    if rates:
        found |= {
            "median_tokens_per_s": statistics.median(rates),
            "best_tokens_per_s": max(rates),
        }
    return {key: value for key, value in found.items() if value is not None}


def _scalars(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in flatten(figures).items() if isinstance(v, int | float | str | bool)}


def _data(run: Artifact) -> dict[str, Any]:
    """The data set's manifest in short, when its folder can still be reached."""
    where = run.input_folders.get("dataset")
    found: dict[str, Any] = {"fingerprint": run.inputs.get("dataset")}
    file = Location.parse(where) / "manifest.json" if where else None
    if file is None or not file.is_file():
        return found | {"manifest": None}
    manifest = file.read_json()
    kept = {
        key: value for key, value in flatten(manifest).items() if not isinstance(value, list | dict)
    }
    return found | {"manifest": kept}
