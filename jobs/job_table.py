"""The tables of `jobs/run.py`: what would run and why, and what ran."""

from __future__ import annotations

import datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.artifact import Artifact, code_version
from pipeline.chain.changes import Records, differences
from pipeline.chain.driver import Selection
from pipeline.chain.estimate import estimate
from pipeline.chain.job_spec import JobSpec, JobStage, Undetermined
from pipeline.lease import holder_of
from pipeline.progress import duration
from pipeline.runner import Label, Planned
from pipeline.storage import Location

_SHOWN_DIFFERENCES = 3


def print_plan(job: JobSpec, storage: Location, selection: Selection) -> None:
    """Show which stages would run, why, and what they will take; Ray is not started."""
    table = Table(
        "stage", "kind", "state", "why", "estimate", "folder", title=f"plan of {job.name}"
    )
    chosen = {stage.name for stage in selection.chosen(job)}
    records = Records(storage)
    will_run: set[str] = set()
    for stage, found in job.plan(storage):
        folder = "" if isinstance(found, Undetermined) else str(found.output)
        forced = stage.is_among(selection.force)
        if stage.name not in chosen:
            state = "done" if found.is_done else "not run"
            table.add_row(stage.name, stage.kind, state, "left out by from= or only=", "", folder)
            continue
        if isinstance(found, Planned) and found.is_done and not forced:
            table.add_row(stage.name, stage.kind, "done", _done(found), "", folder)
            continue
        state, why = ("to run", "forced") if forced else _why(job, stage, found, will_run, records)
        cost = str(estimate(found, records)) if isinstance(found, Planned) else ""
        table.add_row(stage.name, stage.kind, state, why, cost, folder)
        will_run.add(stage.name)
    _console().print(table)


def _done(planned: Planned) -> str:
    assert planned.found is not None
    made_by = planned.found.versions.get("code")
    if made_by and made_by != code_version():
        return f"its artifact is there (made by code {made_by}; this is {code_version()})"
    return "its artifact is there"


def _why(
    job: JobSpec,
    stage: JobStage,
    found: Planned | Undetermined,
    will_run: set[str],
    records: Records,
) -> tuple[str, str]:
    if isinstance(found, Undetermined):
        return "to run", f"after {found.waits_for}: its best trial's settings are not known yet"
    if found.found is not None:
        return "to run", _left(found.found)
    earlier = records.earlier(found, Label(job.name, stage.name))
    if earlier is None:
        waiting = sorted(stage.needs & will_run)
        after = f", after {', '.join(waiting)}" if waiting else ""
        return "to run", f"no artifact of this spec and these inputs{after}"
    changes = list(differences(found, earlier))
    more = len(changes) - _SHOWN_DIFFERENCES
    shown = "; ".join(changes[:_SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
    return "stale", shown


def _left(artifact: Artifact) -> str:
    if artifact.status == "running":
        holder = holder_of(artifact.folder)
        if holder is not None:
            return f"{holder.holder} is running it"
        return "it was killed; it goes on from what it left"
    what = {"failed": "it failed", "cancelled": "it was interrupted"}[artifact.status]
    why = f" ({artifact.error})" if artifact.error and artifact.status == "failed" else ""
    return f"{what}{why}; it goes on from what it left"


def print_status(job: JobSpec, storage: Location) -> None:
    """Show what has run and what runs now, from what lies beside the outputs alone."""
    columns = ("stage", "state", "started", "took", "figures", "code", "folder")
    table = Table(*columns, title=f"status of {job.name}")
    ended_badly: set[str] = set()
    for stage, found in job.plan(storage):
        blocked = sorted(stage.needs & ended_badly)
        artifact = None if isinstance(found, Undetermined) else found.found
        if artifact is None:
            if blocked:
                ended_badly.add(stage.name)
            state = f"waits for {', '.join(blocked)}, which failed" if blocked else "not run"
            folder = "" if isinstance(found, Undetermined) else str(found.output)
            table.add_row(stage.name, state, "", "", "", "", folder)
            continue
        if artifact.status == "failed":
            ended_badly.add(stage.name)
        state, took, about = _state(artifact)
        code = artifact.versions.get("code", "")
        started = artifact.started_at.removesuffix("+00:00") + "Z"
        table.add_row(stage.name, state, started, took, about, code, str(artifact.folder))
    _console().print(table)


def _state(artifact: Artifact) -> tuple[str, str, str]:
    """State, time taken, and figures or progress or reason."""
    tries = f" (attempt {artifact.attempts})" if artifact.attempts > 1 else ""
    if artifact.status == "running":
        holder = holder_of(artifact.folder)
        if holder is None:
            return f"killed{tries}", "", "run the job again: it goes on from what it left"
        began = datetime.datetime.fromisoformat(artifact.started_at)
        so_far = (datetime.datetime.now(datetime.UTC) - began).total_seconds()
        progress = holder.progress or {}
        line = f"{progress['what']}  {progress['line']}" if progress else holder.holder
        return f"running{tries}", duration(max(so_far, 0.0)), line
    took = duration(artifact.took_s) if artifact.took_s is not None else ""
    if artifact.status == "done":
        return f"done{tries}", took, _figures(artifact.figures)
    return f"{artifact.status}{tries}", took, artifact.error or ""


def _figures(figures: dict[str, Any], most: int = 6) -> str:
    """The first scalar figures, as `name value`."""
    scalars = {k: v for k, v in figures.items() if isinstance(v, int | float)}
    shown = [
        f"{name} {value:,.2f}" if isinstance(value, float) else f"{name} {value:,}"
        for name, value in list(scalars.items())[:most]
    ]
    return "  ".join(shown)


def _console() -> Console:
    """As wide as the terminal; elsewhere wide enough that folders stay whole."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 220))
