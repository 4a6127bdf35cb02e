"""What came of the trials."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.specs import TuneSpec


def trial_row(result: Any, metric: str) -> dict[str, Any]:
    """One trial: its settings, its last value of the metric, and why it failed if it did."""
    metrics = result.metrics or {}
    value = metrics.get(metric)
    if result.metrics_dataframe is not None and metric in result.metrics_dataframe:
        value = float(result.metrics_dataframe[metric].dropna().iloc[-1])
    error = result.error
    lines = str(error).strip().splitlines() if error else []
    return {
        "trial": metrics.get("trial_id", ""),
        "settings": dict(result.config or {}),
        "value": None if value is None or not math.isfinite(value) else float(value),
        "step": metrics.get("step"),
        "took_s": metrics.get("time_total_s"),
        "error": lines[-1] if lines else None,
    }


def print_trials(spec: TuneSpec, trials: list[dict[str, Any]]) -> None:
    """Show the trials, the best first."""
    keys = list(spec.search.space)
    table = Table(
        "trial",
        *(key.rpartition(".")[2] for key in keys),
        "step",
        spec.search.metric,
        "took",
        "problem",
        title="trials",
    )
    for row in trials:
        value = "" if row["value"] is None else f"{row['value']:.4f}"
        took = "" if row["took_s"] is None else f"{row['took_s']:.0f} s"
        settings = [_shown(row["settings"].get(key)) for key in keys]
        step = "" if row["step"] is None else str(row["step"])
        table.add_row(row["trial"], *settings, step, value, took, row["error"] or "")
    Console().print(table)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
