"""What came of the trials, read from what each left in its folder."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from pipeline.errors import user_error_within
from pipeline.specs import TuneSpec
from pipeline.specs.tune import Mode
from pipeline.storage import Location
from pipeline.training.metrics import SUMMARY, read_rows
from pipeline.tuning.budget import last_step
from pipeline.tuning.space import EVALUATED_PREFIX
from pipeline.tuning.trial import EVALUATED_FILE


@dataclass(frozen=True)
class TrialResult:
    """One trial: what it tried, how far it came, what it reached, or why it failed."""

    trial: str
    settings: dict[str, Any]
    state: Literal["done", "stopped", "failed"]
    step: int
    values: dict[str, float | None]  # of the goals; None: not finite, or never reported
    curve: list[list[float]] = field(default_factory=list)  # [step, the scheduler's metric]
    took_s: float | None = None
    error: str | None = None
    on_front: bool = False

    def is_comparable(self) -> bool:
        """Whether all goals were reached by a number."""
        return all(value is not None for value in self.values.values())


def trial_result(result: Any, spec: TuneSpec, output: Location) -> TrialResult:
    """Read one trial; `result` is Ray Tune's."""
    metrics = result.metrics or {}
    name = metrics.get("trial_id") or _trial_id(result)
    folder = output / "trials" / name
    valid = [row for row in read_rows(folder) if row["kind"] == "valid"]
    evaluated = folder / EVALUATED_FILE
    at_end: dict[str, float] = evaluated.read_json() if evaluated.is_file() else {}
    during = valid[-1] if valid else {}
    metric = spec.search.metric.removeprefix("valid_")
    is_done = (folder / SUMMARY).is_file() and not result.error
    return TrialResult(
        trial=name,
        settings=dict(result.config or {}),
        state="failed" if result.error else "done" if is_done else "stopped",
        step=last_step(folder),
        values={
            goal: _finite(
                at_end.get(goal)
                if goal.startswith(EVALUATED_PREFIX)
                else during.get(goal.removeprefix("valid_"))
            )
            for goal in spec.search.goals
        },
        curve=[[float(row["step"]), float(row[metric])] for row in valid],
        took_s=metrics.get("time_total_s"),
        error=_reason(result.error) if result.error else None,
    )


def _trial_id(result: Any) -> str:
    """From the name of Tune's folder, `trial_<id>_<number>_…`: one that failed at once has no
    metrics."""
    found = re.search(r"trial_(\w+?_\d{5})_", str(result.path))
    return found[1] if found else str(result.path).rsplit("/", 1)[-1]


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _reason(error: Any) -> str:
    """Why a trial failed, in one sentence: the user's error, or the last error that is named."""
    reason = user_error_within(error if isinstance(error, BaseException) else None)
    if reason is not None:
        return reason.message
    lines = str(error).strip().splitlines()
    named = [line.strip() for line in lines if re.match(r"\s*[\w.]*(Error|Exception)\b.*:", line)]
    last = (named or lines or [type(error).__name__])[-1].strip()
    return re.sub(r"^[\w.]*UserError: ", "", last)[:400]


def judged(trials: Sequence[TrialResult], goals: Mapping[str, Mode]) -> list[TrialResult]:
    """The trials, best first by the first goal; those that no other beats in all are marked."""
    first = next(iter(goals))
    sign = {goal: 1.0 if mode == "min" else -1.0 for goal, mode in goals.items()}
    comparable = [trial for trial in trials if trial.is_comparable()]
    front = {id(trial) for trial in pareto_front(comparable, sign)}
    marked = [TrialResult(**{**vars(t), "on_front": id(t) in front}) for t in trials]

    def rank(trial: TrialResult) -> tuple[bool, float]:
        value = trial.values[first]
        return (not trial.is_comparable(), sign[first] * (value if value is not None else 0.0))

    return sorted(marked, key=rank)


def pareto_front(trials: Sequence[TrialResult], sign: Mapping[str, float]) -> list[TrialResult]:
    """Those that no other trial beats: at least as good in every goal, and better in one."""

    def key(trial: TrialResult) -> list[float]:
        return [sign[goal] * (trial.values[goal] or 0.0) for goal in sign]

    def beats(a: list[float], b: list[float]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    keys = [key(trial) for trial in trials]
    return [
        trial
        for trial, mine in zip(trials, keys, strict=True)
        if not any(beats(other, mine) for other in keys)
    ]


def as_json(trials: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """The trials as plain values."""
    return [asdict(trial) for trial in trials]


def print_trials(spec: TuneSpec, trials: Sequence[TrialResult]) -> None:
    """Show the trials, the best first."""
    keys = list(spec.search.space)
    goals = list(spec.search.goals)
    front = ["front"] if len(goals) > 1 else []
    table = Table(
        "trial", *(key.rpartition(".")[2] for key in keys), "state", "step", *goals, *front,
        "took", "problem", title="trials",
    )  # fmt: skip
    for trial in trials:
        values = ["" if v is None else f"{v:.4f}" for v in trial.values.values()]
        took = "" if trial.took_s is None else f"{trial.took_s:.0f} s"
        settings = [_shown(trial.settings.get(key)) for key in keys]
        mark = [("*" if trial.on_front else "")] if front else []
        table.add_row(
            trial.trial, *settings, trial.state, str(trial.step), *values, *mark, took,
            trial.error or "",
        )  # fmt: skip
    Console().print(table)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
