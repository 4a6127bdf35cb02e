"""The content of a study's page: systems side by side, each with its seeds, and the front.

A system's figure is the mean over its seeds. Its error is over documents, the mean of the seeds'
own: all read the same documents, so that more seeds make it no smaller. Its spread is the standard
deviation over seeds, and is there from two seeds on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.artifact import Artifact, flatten, versions
from pipeline.errors import UserError
from pipeline.evaluation.figures import ACTIVE_ABOVE, LABELS
from pipeline.report.comparison import training_of
from pipeline.report.pairing import LARGER_THAN, DocumentTable

_SEED = "train.seed"  # what runs of one system may differ in
_MIB = 2**20

Found = tuple[float | None, float | None]  # a figure of one run, and its error over documents


@dataclass(frozen=True)
class Run:
    """An evaluation, and the training whose weights it measured, where that can be reached."""

    evaluation: Artifact
    training: Artifact | None


@dataclass(frozen=True)
class Column:
    """A figure of a study's table."""

    name: str
    title: str
    unit: str
    of: Callable[[Run], Found]


def build_study(
    title: str,
    names: Sequence[str],
    evaluations: Sequence[Artifact],
    against: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Gather what the page of a study shows; settings are set beside those of the first system.

    Args:
        title: the heading.
        names: of each evaluation, which system it is of.
        evaluations: those to show.
        against: of `names`, those that each is compared with; by default the first.

    Raises:
        UserError: if there is not a name for each, one is no evaluation, or runs of one name
            differ in more than their seed.
    """
    _check(names, evaluations)
    systems: dict[str, list[Run]] = {}
    for name, evaluation in zip(names, evaluations, strict=True):
        systems.setdefault(name, []).append(Run(evaluation, training_of(evaluation)))
    settings = {name: _settings(name, runs) for name, runs in systems.items()}
    tables = {
        name: [DocumentTable.of(r.evaluation) for r in runs] for name, runs in systems.items()
    }
    first = next(iter(systems))
    bases = list(dict.fromkeys(against or [first]))
    rows = [
        {
            "number": number,
            "name": name,
            "seeds": len(runs),
            "settings": _differing(settings[name], settings[first]),
            "collapsed": sum(bool(run.evaluation.figures.get("collapsed")) for run in runs),
            "cells": {column.name: _cell(column, runs) for column in COLUMNS},
            "differences": {
                base: _difference(tables[name], tables[base]) for base in bases if base != name
            },
            "kl_per_layer": _mean_of_lists([r.evaluation.figures["kl_per_layer"] for r in runs]),
            "samples": runs[0].evaluation.figures.get("samples", [])[:3],
        }
        for number, (name, runs) in enumerate(systems.items(), start=1)
    ]
    for row, on_front in zip(rows, _front(rows), strict=True):
        row["on_front"] = on_front
    evaluation = evaluations[0]
    return {
        "kind": "study",
        "title": title,
        "columns": [
            {"name": column.name, "title": column.title, "unit": column.unit}
            for column in COLUMNS
            if any(row["cells"][column.name]["value"] is not None for row in rows)
        ],
        "systems": rows,
        "against": bases,
        "split": evaluation.figures.get("split"),
        "num_documents": evaluation.figures["num_documents"],
        "iw_samples": evaluation.figures["iw_samples"],
        "same_documents": len({table.names for each in tables.values() for table in each}) == 1,
        "versions": {"report": versions(), "evaluation": evaluation.versions},
    }


def _check(names: Sequence[str], evaluations: Sequence[Artifact]) -> None:
    if len(names) != len(evaluations) or not evaluations:
        raise UserError(
            f"names has {len(names)} entries and runs {len(evaluations)}: expected one for each "
            "run, which system it is of; give names=[A,B] beside runs=[FOLDER,FOLDER]."
        )
    for evaluation in evaluations:
        if evaluation.stage != "evaluate":
            raise UserError(
                f"runs holds {evaluation.folder}, the artifact of the stage {evaluation.stage}: "
                "expected evaluations, whose figures a study shows; give the folders that "
                "jobs/evaluate.py printed."
            )


def _settings(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    """What a system's trainings have in common: all but the seed."""
    found = [flatten(run.training.spec) for run in runs if run.training is not None]
    for spec in found:
        differing = [key for key in _differing(spec, found[0]) if key != _SEED]
        if differing:
            raise UserError(
                f"the runs named '{name}' differ in {', '.join(differing)}: expected seeds of one "
                "system, whose spread is shown; give other systems names of their own."
            )
    return {key: value for key, value in found[0].items() if key != _SEED} if found else {}


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    keys = sorted(ours.keys() | theirs.keys())
    return {key: ours.get(key) for key in keys if ours.get(key) != theirs.get(key)}


def _cell(column: Column, runs: Sequence[Run]) -> dict[str, float | None]:
    found = [column.of(run) for run in runs]
    values = [value for value, _ in found if value is not None]
    errors = [error for _, error in found if error is not None]
    return {
        "value": statistics.fmean(values) if values else None,
        "error": statistics.fmean(errors) if errors else None,
        "spread": statistics.stdev(values) if len(values) > 1 else None,
    }


def _difference(
    ours: Sequence[DocumentTable], theirs: Sequence[DocumentTable]
) -> dict[str, Any] | None:
    """IW-NLL less another system's, over the same documents, each document a mean over seeds.

    The error is that of the documents alone. The spread is the standard deviation of the
    difference over seeds, each system's seeds drawn on their own; what is larger is so than both
    errors together, of the documents and of the mean over seeds. A system of one seed is held to
    spread as the other does: its one draw is no more certain than each of theirs.
    """
    if any(table.names != theirs[0].names for table in (*ours, *theirs)):
        return None
    systems = [np.stack([table.columns["iw_nll"] for table in each]) for each in (ours, theirs)]
    mine, base = (seeds.mean(0) for seeds in systems)
    deviations = mine - base
    value = float(deviations.mean())
    count = len(deviations)
    error = float(deviations.std(ddof=1)) / math.sqrt(count) if count > 1 else None
    spreads = [statistics.stdev(seeds.mean(1)) for seeds in systems if len(seeds) > 1]
    known = len(spreads) == len(systems)
    if not known:
        spreads = [max(spreads, default=0.0)] * len(systems)
    of_seeds = math.hypot(
        *(spread / math.sqrt(len(seeds)) for spread, seeds in zip(spreads, systems, strict=True))
    )
    return {
        "value": value,
        "error": error,
        "spread": math.hypot(*spreads) if known else None,
        "percent": 100 * value / float(base.mean()),
        "larger": None if error is None else abs(value) > LARGER_THAN * math.hypot(error, of_seeds),
    }


def _front(rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether no other system has as low an IW-NLL and as high an MI, and one of them better."""
    points = [_point(row) for row in rows]

    def beaten(point: tuple[float, float]) -> bool:
        nll, information = point
        return any(
            other != point and other[0] <= nll and other[1] >= information for other in points
        )

    return [not beaten(point) for point in points]


def _point(row: Mapping[str, Any]) -> tuple[float, float]:
    """IW-NLL and MI; a model without latents has no MI to speak of."""
    cells = row["cells"]
    return cells["iw_nll"]["value"], cells["mutual_information"]["value"] or 0.0


def _mean_of_lists(lists: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*lists, strict=True)]


def _evaluated(name: str) -> Column:
    def of(run: Run) -> Found:
        figures = run.evaluation.figures
        return figures.get(name), figures["standard_errors"].get(name)

    return Column(name, LABELS[name].title, LABELS[name].unit, of)


def _of_text(name: str, title: str, path: tuple[str, ...], key: str) -> Column:
    def of(run: Run) -> Found:
        part: Mapping[str, Any] = run.evaluation.figures
        for step in path:
            part = part.get(step) or {}
        return part.get(key), part.get("standard_errors", {}).get(key)

    return Column(name, title, "", of)


def _trained(name: str, title: str, unit: str, key: str, divisor: float = 1.0) -> Column:
    def of(run: Run) -> Found:
        value = run.training.figures.get(key) if run.training is not None else None
        return None if value is None else value / divisor, None

    return Column(name, title, unit, of)


def _active(run: Run) -> Found:
    units = run.evaluation.figures["active_units"].get(f"{min(ACTIVE_ABOVE):g}", [])
    return (float(sum(units)) if units else None), None


COLUMNS = (
    _evaluated("iw_nll"),
    _evaluated("negative_elbo"),
    _evaluated("reconstruction_nll"),
    _evaluated("kl"),
    _evaluated("mutual_information"),
    Column("active_units", "Active units", f"variance above {min(ACTIVE_ABOVE)}", _active),
    _evaluated("ppl_word"),
    _of_text("reconstruction_bleu", "Reconstruction BLEU", ("reconstruction",), "bleu"),
    _of_text("response_bleu", "Responses: BLEU", ("responses",), "bleu"),
    _of_text("sample_bleu", "Samples: BLEU", ("generation", "samples"), "bleu"),
    _of_text("sample_self_bleu", "Samples: Self-BLEU", ("generation", "samples"), "self_bleu"),
    _of_text("sample_distinct_2", "Samples: distinct-2", ("generation", "samples"), "distinct_2"),
    _trained("num_parameters", "Parameters", "", "num_parameters"),
    _trained("tokens_per_s", "Training", "tokens/s", "tokens_per_s"),
    _trained("peak_memory", "Peak memory", "MiB of a worker", "peak_memory_bytes", _MIB),
)
