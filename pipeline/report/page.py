"""The content of a run's page, as plain values: `report.json` is this, the other forms show it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from pipeline.artifact import Artifact, flatten, versions
from pipeline.errors import UserError
from pipeline.evaluation.figures import LABELS, collapse, verdict
from pipeline.storage import Location
from pipeline.training.metrics import FILE_NAME, read_rows
from pipeline.weights import fingerprint_weights

MAX_POINTS = 240  # of one curve: more than a screen's width of a panel would only add bytes

Row = dict[str, Any]


def build_page(title: str, run: Artifact, figures: Artifact | None) -> dict[str, Any]:
    """Gather what the page shows.

    Args:
        title: the heading.
        run: a train stage's artifact; its folder holds `metrics.jsonl`.
        figures: an evaluate stage's artifact, or None when the run was not evaluated.

    Raises:
        UserError: if an artifact is of another stage, the evaluation is not one of this run's
            weights, or `metrics.jsonl` is damaged.
    """
    _require_stage(run, "train", "training")
    if figures is not None:
        _require_stage(figures, "evaluate", "figures")
        _require_same_weights(run, figures)
    rows = read_metrics(run.folder)
    measured = figures.figures if figures is not None else {}
    return {
        "kind": "run",
        "title": title,
        "run": _record(run),
        "evaluation": _record(figures) if figures is not None else None,
        "split": figures.spec.get("split") if figures is not None else None,
        "verdict": _verdict(measured),
        "headline": _headline(measured) if measured else _last_validation(rows),
        "iw_samples": measured.get("iw_samples"),
        "counts": {k: measured[k] for k in _COUNTS if k in measured},
        "curves": curves_of(rows),
        "kl_per_layer_over_time": _layers_over_time(rows),
        "kl_per_layer": _layers(measured),
        "active_units": measured.get("active_units"),
        "latent_size": measured.get("latent_size"),
        "notes": _notes(measured),
        **{name: measured.get(name) for name in _MEASURED},
        **{name: measured.get(name, []) for name in _TEXTS},
        "throughput": _throughput(rows, run),
        "training": _scalars(run.figures),
        "config": {
            "train": flatten(run.spec),
            "evaluate": flatten(figures.spec) if figures is not None else {},
        },
        "data": _data(run),
        "versions": {"run": run.versions, "report": versions()},
    }


# What the page shows as the evaluation gives it.
_MEASURED = (
    "posterior_mean_variance",
    "kl_per_dimension",
    "iw_curve",
    "probe",
    "projection",
    "generation",
    "reconstruction",
    "responses",
    "paper_convention",
)
_TEXTS = ("samples", "reconstructions", "interpolations", "answers")
_COUNTS = ("num_documents", "num_tokens", "num_words")
_CURVES = (
    "loss",
    "negative_elbo",
    "reconstruction_nll",
    "kl",
    "bag_of_words_nll",
    "beta",
    "learning_rate",
    "tokens_per_s",
    "grad_norm",
)


def read_metrics(folder: Location) -> list[Row]:
    """Rows of a run's `metrics.jsonl`; none when the file is not there.

    Raises:
        UserError: if a line is damaged.
    """
    try:
        return read_rows(folder)
    except ValueError as error:
        raise UserError(
            f"{folder / FILE_NAME} should hold a JSON object a line but does not ({error}): it was "
            "damaged or edited; restore it, or delete the damaged lines."
        ) from None


def _require_stage(artifact: Artifact, stage: str, key: str) -> None:
    if artifact.stage != stage:
        raise UserError(
            f"{key}={artifact.folder} is the artifact of the stage {artifact.stage}: expected one "
            f"of {stage}, whose content the page shows; give the folder that it printed."
        )


def _require_same_weights(run: Artifact, figures: Artifact) -> None:
    """Figures of another run beside these curves would be believed."""
    evaluated = figures.inputs.get("weights")
    if evaluated == run.fingerprint:
        return
    for name in ("best", "last"):
        folder = run.folder / "weights" / name
        if (folder / "config.json").is_file() and fingerprint_weights(folder) == evaluated:
            return
    raise UserError(
        f"figures={figures.folder} is an evaluation of other weights than those of "
        f"training={run.folder}: its figures would stand beside curves that are not theirs; "
        "evaluate this run's weights, and give the folder that it prints."
    )


def _record(artifact: Artifact) -> dict[str, Any]:
    names = ("fingerprint", "status", "started_at", "finished_at", "took_s", "inputs")
    return {name: getattr(artifact, name) for name in names}


def _verdict(figures: Mapping[str, Any]) -> dict[str, Any] | None:
    """Whether the latents live, in a sentence."""
    if "kl" not in figures or "active_units" not in figures:
        return None
    return {"collapsed": collapse(figures) is not None, "sentence": verdict(figures)}


def _notes(figures: Mapping[str, Any]) -> list[str]:
    """What has to be said beside the figures."""
    sentence = figures.get("aggregate_posterior", {}).get("sentence")
    return [sentence] if sentence else []


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


def curves_of(rows: list[Row]) -> dict[str, dict[str, list[list[float]]]]:
    """Points [step, value] of every curve that a run recorded, by kind of row."""
    return {key: curve for key in _CURVES if (curve := _curve(rows, key))}


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
    waits = [row["data_wait_s"] / row["step_s"] for row in train[1:] if row.get("step_s")]
    if waits:
        found["share_waiting_for_data"] = statistics.fmean(waits)
    if rates:
        found |= {
            "median_tokens_per_s": statistics.median(rates),
            "best_tokens_per_s": max(rates),
        }
    return {key: value for key, value in found.items() if value is not None}


def _scalars(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in flatten(figures).items() if isinstance(v, int | float | str | bool)}


def _data(run: Artifact) -> dict[str, Any]:
    """The data set's manifest in short; without it, when its folder cannot be reached any more."""
    found: dict[str, Any] = {"fingerprint": run.inputs.get("dataset"), "splits": {}}
    where = run.input_folders.get("dataset")
    file = Location.parse(where) / "manifest.json" if where else None
    if file is None or not file.is_file():
        return found
    manifest = file.read_json()
    counts = ("documents", "tokens", "words", "max_length")
    return found | {
        "splits": {
            name: {count: split.get(count) for count in counts}
            for name, split in manifest.get("splits", {}).items()
        },
        "tokenizer": _scalars(manifest.get("tokenizer", {})),
        "rejected": manifest.get("rejected", {}),
        "blank_lines": manifest.get("blank"),
        "input_files": len(manifest.get("inputs", [])),
    }
