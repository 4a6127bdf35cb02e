"""Differences of two evaluations' figures, and whether they are larger than their errors."""

from __future__ import annotations

import io
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.artifact import Artifact
from pipeline.errors import UserError

LARGER_THAN = 2.0  # standard errors, beyond which a difference is called larger than its error
_NATS = ("reconstruction_nll", "kl", "negative_elbo", "iw_nll", "elbo_gap")


@dataclass(frozen=True)
class Difference:
    """A figure of one run less that of another."""

    value: float
    error: float | None  # standard error
    paired: bool  # over the same documents

    @property
    def larger(self) -> bool | None:
        """Whether it is larger than `LARGER_THAN` errors; None where no error is known."""
        return None if self.error is None else abs(self.value) > LARGER_THAN * self.error

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the page."""
        return {
            "value": self.value,
            "error": self.error,
            "paired": self.paired,
            "larger": self.larger,
        }


@dataclass(frozen=True)
class DocumentTable:
    """The figures of an evaluation's documents, in the order of their names."""

    names: tuple[tuple[str, int], ...]  # the document's id, and which of its copies it is
    columns: dict[str, NDArray[np.float64]]

    @classmethod
    def of(cls, evaluation: Artifact) -> DocumentTable:
        """Read `documents.parquet`.

        Raises:
            UserError: if the evaluation has none that can be read.
        """
        file = evaluation.folder / "documents.parquet"
        try:
            table = pq.read_table(io.BytesIO(file.read_bytes()))
            ids = table.column("document_id").to_pylist()
            names = ("reconstruction_nll", "kl", "iw_nll", "num_predicted", "num_words")
            columns = {n: table.column(n).to_numpy().astype(np.float64) for n in names}
        except (OSError, KeyError, ValueError) as error:
            raise UserError(
                f"{file} should hold the figures of single documents but cannot be read ({error}): "
                "runs are compared document by document; evaluate the weights again."
            ) from None
        seen: Counter[str] = Counter()
        copies = []
        for name in ids:
            copies.append((name, seen[name]))
            seen[name] += 1
        order = sorted(range(len(copies)), key=copies.__getitem__)
        columns["negative_elbo"] = columns["reconstruction_nll"] + columns["kl"]
        columns["elbo_gap"] = columns["negative_elbo"] - columns["iw_nll"]
        return cls(
            tuple(copies[i] for i in order), {n: values[order] for n, values in columns.items()}
        )


def difference(
    name: str, ours: Artifact, theirs: Artifact, tables: tuple[DocumentTable, DocumentTable]
) -> Difference | None:
    """A figure of `ours` less that of `theirs`; None where the two do not compare.

    Over the same documents the error is that of the documents' differences, much smaller than
    that of either figure; else both errors together. Perplexities per token compare only where the
    tokens are the same.
    """
    value, other = ours.figures.get(name), theirs.figures.get(name)
    if value is None or other is None:
        return None
    mine, base = tables
    same = mine.names == base.names
    if name.startswith("ppl_token") and (not same or _tokens_differ(mine, base)):
        return None
    if same and name in _NATS:
        deviations = mine.columns[name] - base.columns[name]
        return Difference(value - other, _error_of_mean(deviations), True)
    if same and name.startswith("ppl_"):
        units = "num_words" if name == "ppl_word" else "num_predicted"
        nll = "negative_elbo" if name.endswith("elbo") else "iw_nll"
        deviations = _linearized(mine, nll, units, value) - _linearized(base, nll, units, other)
        return Difference(value - other, _error_of_mean(deviations), True)
    errors = [run.figures.get("standard_errors", {}).get(name) for run in (ours, theirs)]
    known = [error for error in errors if error is not None]
    error = math.hypot(*known) if len(known) == len(errors) else None
    return Difference(value - other, error, False)


def _tokens_differ(one: DocumentTable, other: DocumentTable) -> bool:
    return bool((one.columns["num_predicted"] != other.columns["num_predicted"]).any())


def _linearized(
    table: DocumentTable, nll: str, units: str, perplexity: float
) -> NDArray[np.float64]:
    """What each document adds to a perplexity's error: the delta method, before its mean."""
    values, counts = table.columns[nll], table.columns[units]
    rate = values.sum() / counts.sum()
    added: NDArray[np.float64] = perplexity * (values - rate * counts) / counts.mean()
    return added


def _error_of_mean(values: NDArray[np.float64]) -> float | None:
    count = len(values)
    return float(np.std(values, ddof=1) / math.sqrt(count)) if count > 1 else None
