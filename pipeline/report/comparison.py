"""The content of a comparison: several evaluated runs side by side, and beside the literature."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from pipeline.artifact import Artifact, flatten, versions
from pipeline.errors import UserError
from pipeline.evaluation.figures import ACTIVE_ABOVE, LABELS, PAPER_CONVENTION, verdict
from pipeline.evaluation.table import TEXT_LABELS
from pipeline.report.page import curves_of, read_metrics
from pipeline.report.pairing import DocumentTable, difference
from pipeline.report.paper import OURS_AVERAGED, PRINTED, TABLES, VALID, Corpus
from pipeline.storage import Location

MOST = len(string.ascii_uppercase)
_HIGHER_IS_BETTER = ("mutual_information",)
_NEITHER_IS_BETTER = ("kl", "elbo_gap")


def build_comparison(
    title: str, evaluations: Sequence[Artifact], paper: Corpus | None
) -> dict[str, Any]:
    """Gather what the page of a comparison shows; the first run is what the others differ from.

    Raises:
        UserError: if there are too few or too many runs, or one is no evaluation.
    """
    _check(evaluations, paper)
    letters = list(string.ascii_uppercase[: len(evaluations)])
    trainings = [training_of(evaluation) for evaluation in evaluations]
    specs = [flatten(training.spec) if training else {} for training in trainings]
    tables = [DocumentTable.of(evaluation) for evaluation in evaluations]
    by_letter = dict(zip(letters, evaluations, strict=True))
    return {
        "kind": "comparison",
        "title": title,
        "runs": list(map(_run, letters, evaluations, trainings)),
        "same_documents": all(table.names == tables[0].names for table in tables),
        "config_differences": _config_differences(letters, specs),
        "figures": [row for name in LABELS if (row := _row(name, evaluations, tables))],
        "texts": _texts(evaluations),
        "paper": _paper(paper, letters, evaluations) if paper else None,
        "curves": _curves(letters, trainings),
        "kl_per_layer": {k: e.figures["kl_per_layer"] for k, e in by_letter.items()},
        "active_units": {k: _active(e) for k, e in by_letter.items()},
        "iw_curve": {k: e.figures.get("iw_curve") for k, e in by_letter.items()},
        "samples": {k: e.figures.get("samples", []) for k, e in by_letter.items()},
        "versions": {"report": versions()},
    }


def _check(evaluations: Sequence[Artifact], paper: Corpus | None) -> None:
    least = 1 if paper else 2
    if not least <= len(evaluations) <= MOST:
        raise UserError(
            f"runs names {len(evaluations)} artifacts: expected {least} to {MOST}, one for each "
            "column of the comparison; give runs=[A,B]."
        )
    for evaluation in evaluations:
        if evaluation.stage != "evaluate":
            raise UserError(
                f"runs holds {evaluation.folder}, the artifact of the stage {evaluation.stage}: "
                "expected evaluations, whose figures are compared; give the folder that "
                "jobs/evaluate.py printed."
            )


def training_of(evaluation: Artifact) -> Artifact | None:
    """The training whose weights were evaluated, where it can still be reached."""
    folder = evaluation.input_folders.get("weights")
    found = Artifact.find(Location.parse(folder)) if folder else None
    same = found is not None and found.fingerprint == evaluation.inputs.get("weights")
    return found if same else None


def _run(letter: str, evaluation: Artifact, training: Artifact | None) -> dict[str, Any]:
    figures = evaluation.figures
    return {
        "letter": letter,
        "evaluation": evaluation.fingerprint,
        "training": training.fingerprint if training else None,
        "weights": evaluation.input_folders.get("weights"),
        "split": figures.get("split"),
        "num_documents": figures["num_documents"],
        "iw_samples": figures["iw_samples"],
        "num_parameters": training.figures.get("num_parameters") if training else None,
        "took_s": training.took_s if training else None,
        "collapsed": figures.get("collapsed"),
        "verdict": verdict(figures),
        "versions": evaluation.versions,
    }


def _config_differences(
    letters: Sequence[str], specs: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Settings that are not the same in all runs."""
    keys = sorted({key for spec in specs for key in spec})
    rows = [(key, [spec.get(key) for spec in specs]) for key in keys]
    return [
        {"key": key, "values": dict(zip(letters, values, strict=True))}
        for key, values in rows
        if any(value != values[0] for value in values)
    ]


def _row(
    name: str, evaluations: Sequence[Artifact], tables: Sequence[DocumentTable]
) -> dict[str, Any] | None:
    """One figure of all runs, with what each differs from the first by."""
    if not any(name in evaluation.figures for evaluation in evaluations):
        return None
    base, base_table = evaluations[0], tables[0]
    cells = []
    for evaluation, table in zip(evaluations, tables, strict=True):
        less = None
        if evaluation is not base:
            less = difference(name, evaluation, base, (table, base_table))
        cells.append(
            {
                "value": evaluation.figures.get(name),
                "error": evaluation.figures.get("standard_errors", {}).get(name),
                "difference": less.as_dict() if less else None,
                "better": _better(name, less.value, less.larger) if less else None,
            }
        )
    label = LABELS[name]
    return {"name": name, "title": label.title, "unit": label.unit, "cells": cells}


def _better(name: str, value: float, larger: bool | None) -> bool | None:
    """Whether a difference beyond its error is for the better; None where neither can be said."""
    if not larger or name in _NEITHER_IS_BETTER:
        return None
    return (value > 0) == (name in _HIGHER_IS_BETTER)


def _texts(evaluations: Sequence[Artifact]) -> list[dict[str, Any]]:
    """Figures of texts, a row a figure; None where a run has it not."""
    sections = (
        ("generation", "samples", "Samples: {}"),
        ("reconstruction", None, "Reconstructions: {}"),
        ("responses", None, "Responses: {}"),
    )
    rows = []
    for section, inner, title in sections:
        found = [evaluation.figures.get(section) or {} for evaluation in evaluations]
        parts = [part.get(inner, {}) if inner else part for part in found]
        for key, label in TEXT_LABELS.items():
            if any(key in part for part in parts):
                cells = [
                    {
                        "value": part.get(key),
                        "error": part.get("standard_errors", {}).get(key),
                    }
                    for part in parts
                ]
                rows.append({"title": title.format(label), "cells": cells})
    return rows


def _paper(
    corpus: Corpus, letters: Sequence[str], evaluations: Sequence[Artifact]
) -> dict[str, Any]:
    """Our figures beside the paper's, each with the convention that it was computed by."""
    rows: list[dict[str, Any]] = [
        {
            "name": f"{printed.name} (Hu et al. 2022)",
            "convention": PRINTED,
            "ppl": printed.ppl,
            "negative_elbo": printed.negative_elbo,
            "kl": printed.kl,
            "mutual_information": printed.mutual_information,
            "active_units": printed.active_units,
        }
        for printed in TABLES[corpus]
    ]
    for letter, evaluation in zip(letters, evaluations, strict=True):
        figures = evaluation.figures
        active = _active(evaluation)
        mean_active = sum(active) / len(active) if active else 0.0
        averaged = figures["paper_convention"]
        rows.append(
            {
                "name": letter,
                "convention": VALID,
                "ppl": figures["ppl_token"],
                "negative_elbo": figures["negative_elbo"],
                "kl": figures["kl"],
                "mutual_information": figures.get("mutual_information"),
                "active_units": mean_active,
                "ppl_word": figures["ppl_word"],
            }
        )
        rows.append(
            {
                "name": letter,
                "convention": OURS_AVERAGED,
                "ppl": averaged["ppl"],
                "negative_elbo": averaged["negative_elbo"],
                "kl": averaged["kl"],
                "mutual_information": None,
                "active_units": mean_active,
            }
        )
    return {"corpus": corpus, "rows": rows, "sentence": PAPER_CONVENTION}


def _active(evaluation: Artifact) -> list[int]:
    counts: list[int] = evaluation.figures["active_units"][f"{min(ACTIVE_ABOVE):g}"]
    return counts


def _curves(
    letters: Sequence[str], trainings: Sequence[Artifact | None]
) -> dict[str, dict[str, list[list[float]]]]:
    """Each curve of every run: validation where there are points enough, else training."""
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for letter, training in zip(letters, trainings, strict=True):
        if training is None:
            continue
        for key, curve in curves_of(read_metrics(training.folder)).items():
            enough = len(curve.get("valid", [])) > 1
            kind = "valid" if enough or "train" not in curve else "train"
            curves.setdefault(key, {})[letter] = curve[kind]
    return curves
