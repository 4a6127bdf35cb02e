"""The page of a search: what was tried, what came of it, which settings mattered."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from pipeline.report.plots import GRID, INK, MUTED, TRAIN, VALID, Line, drawn_panel, line_panel
from pipeline.report.render import template
from pipeline.specs import Range, TuneSpec
from pipeline.specs.tune import Mode
from pipeline.tuning.importance import importances
from pipeline.tuning.results import TrialResult

FRONT = "#d64b5f"


def search_page(spec: TuneSpec, trials: Sequence[TrialResult]) -> str:
    """One HTML file that refers to nothing outside of it; `trials` are best first."""
    goals = spec.search.goals
    comparable = [trial for trial in trials if trial.is_comparable()]
    best = trials[0]
    return template("search.html.jinja", autoescape=True).render(
        title=f"Search of {len(trials)} trials",
        goals=[{"name": n, "mode": mode, "value": best.values[n]} for n, mode in goals.items()],
        best=best,
        trials=trials,
        keys=list(spec.search.space),
        panels=list(_panels(spec, trials, comparable)),
        search={
            "sampler": spec.search.sampler,
            "scheduler": spec.search.scheduler,
            "compared while running": f"{spec.search.metric} ({spec.search.mode})",
            "seed": spec.search.seed,
            "trials": spec.planned_trials,
            "max_total_steps": spec.max_total_steps,
            "max_time_s": spec.max_time_s,
        },
        steps=sum(trial.step for trial in trials),
        counts={
            state: sum(trial.state == state for trial in trials)
            for state in ("done", "stopped", "failed")
        },
    )


def _panels(
    spec: TuneSpec, trials: Sequence[TrialResult], comparable: Sequence[TrialResult]
) -> Iterator[dict[str, Any]]:
    goals = spec.search.goals
    first = next(iter(goals))
    if comparable:
        title = "Settings and result of each trial"
        yield _panel(title, _parallel(title, spec, comparable), "the darker, the better; red: best")
    title = f"{spec.search.metric} over steps"
    lines = [_line(trial, trial is trials[0]) for trial in reversed(trials) if trial.curve]
    if lines:
        about = "grey and ending early: stopped; red: the best trial"
        yield _panel(title, line_panel(title, lines, spec.search.metric), about)
    weights = importances(spec, comparable, first, goals[first])
    if weights:
        title = f"What mattered for {first}"
        about = "PED-ANOVA: share of the variance between good and other trials"
        yield _panel(title, _bars(title, weights), about)
    if len(goals) > 1 and comparable:
        x, y = list(goals)[:2]
        title = f"{x} against {y}"
        about = "red: the Pareto front, which no trial beats in both"
        yield _panel(title, _front(title, comparable, goals), about)


def _panel(title: str, svg: str, about: str) -> dict[str, Any]:
    # Markup: our own plot of numbers and of keys that the train spec knows.
    return {"title": title, "svg": Markup(svg), "about": about}


def _line(trial: TrialResult, is_best: bool) -> Line:
    if is_best:
        return Line("best", trial.curve, FRONT, 2.2, marked=True)
    if trial.state == "done":
        return Line("", trial.curve, VALID, 1.3)
    return Line("", trial.curve, TRAIN, 1.1, marked=True)


def _parallel(name: str, spec: TuneSpec, trials: Sequence[TrialResult]) -> str:
    """Parallel coordinates: an axis a setting and one for the first goal, a line a trial."""
    goal, mode = next(iter(spec.search.goals.items()))
    values = [trial.values[goal] or 0.0 for trial in trials]
    low, high = min(values), max(values)
    keys = list(spec.search.space)

    def heights(trial: TrialResult) -> list[float]:
        places = [position(spec.search.space[key], trial.settings.get(key)) for key in keys]
        value = trial.values[goal] or 0.0
        return [*places, (value - low) / (high - low) if high > low else 0.5]

    def draw(axes: Any) -> None:
        for place in range(len(keys) + 1):
            axes.axvline(place, color=GRID, linewidth=1)
        for rank, trial in reversed(list(enumerate(trials))):
            share = 1 - rank / max(len(trials) - 1, 1)
            color, width = (FRONT, 2.2) if rank == 0 else (VALID, 1.1)
            alpha = 1.0 if rank == 0 else 0.15 + 0.6 * share
            axes.plot(range(len(keys) + 1), heights(trial), color=color, alpha=alpha, lw=width)
        for place, key in enumerate(keys):
            bottom, top = ends(spec.search.space[key])
            _label(axes, place, bottom, top)
        _label(axes, len(keys), f"{low:.4g}", f"{high:.4g}")
        names = [key.rpartition(".")[2] for key in keys] + [f"{goal} ({mode})"]
        axes.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
        axes.set_yticks([])
        axes.set_ylim(-0.12, 1.12)
        axes.grid(visible=False)

    return drawn_panel(name, draw)


def _label(axes: Any, place: int, bottom: str, top: str) -> None:
    axes.annotate(bottom, (place, -0.03), ha="center", va="top", fontsize=7, color=MUTED)
    axes.annotate(top, (place, 1.03), ha="center", va="bottom", fontsize=7, color=MUTED)


def position(bounds: Range, value: Any) -> float:
    """Where a value lies in its range, 0 to 1; logarithmic where the range is."""
    if bounds.choice is not None:
        return bounds.choice.index(value) / max(len(bounds.choice) - 1, 1)
    if bounds.loguniform is not None:
        low, high = map(math.log, bounds.loguniform)
        return (math.log(value) - low) / (high - low)
    start, stop = bounds.uniform or bounds.integer or (0.0, 1.0)
    return (value - start) / (stop - start)


def ends(bounds: Range) -> tuple[str, str]:
    """The ends of a range as its axis shows them."""
    values = bounds.choice or bounds.uniform or bounds.loguniform or bounds.integer or ("", "")
    low, high = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in (values[0], values[-1]))
    return low, high


def _bars(name: str, weights: dict[str, float]) -> str:
    def draw(axes: Any) -> None:
        keys = list(reversed(weights))
        axes.barh(range(len(keys)), [weights[key] for key in keys], color=VALID, height=0.6)
        axes.set_yticks(range(len(keys)), [key.rpartition(".")[2] for key in keys], fontsize=9)
        axes.set_xlim(0, 1)
        axes.grid(visible=False)
        axes.grid(visible=True, axis="x", color=GRID)

    return drawn_panel(name, draw)


def _front(name: str, trials: Sequence[TrialResult], goals: dict[str, Mode]) -> str:
    first, second = list(goals)[:2]

    def points(chosen: Sequence[TrialResult]) -> tuple[list[float], list[float]]:
        return [t.values[first] or 0.0 for t in chosen], [t.values[second] or 0.0 for t in chosen]

    def draw(axes: Any) -> None:
        axes.scatter(*points([t for t in trials if not t.on_front]), s=18, color=TRAIN)
        front = sorted((t for t in trials if t.on_front), key=lambda t: t.values[first] or 0.0)
        axes.plot(*points(front), color=FRONT, marker="o", markersize=4, linewidth=1.2)
        for trial in front:
            where = (trial.values[first] or 0.0, trial.values[second] or 0.0)
            axes.annotate(trial.trial[-5:], where, fontsize=7, color=INK, xytext=(4, 4),
                          textcoords="offset points")  # fmt: skip
        axes.set_xlabel(f"{first} ({goals[first]})")
        axes.set_title(f"{second} ({goals[second]})", loc="left", fontsize=9, color=MUTED)
        axes.tick_params(labelsize=8)

    return drawn_panel(name, draw)
