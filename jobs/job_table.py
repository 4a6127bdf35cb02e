"""What `jobs/run.py` does with a job, and the tables that it shows."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.cluster import connected
from pipeline.job_spec import JobSpec
from pipeline.progress import duration
from pipeline.runner import Planned, run_stage
from pipeline.storage import Location


def run_all(job: JobSpec, storage: Location) -> None:
    """Run the stages in order; a stage that is done is named and skipped."""
    console = Console()
    artifact = None
    stages = list(job.plan(storage))
    to_run = [stage.name for stage, planned in stages if not planned.is_done]
    if not to_run:
        for stage, planned in stages:
            console.print(f"{stage.name}: already done  {planned.output}", soft_wrap=True)
        print(f"artifact: {stages[-1][1].output}", flush=True)
        return
    with connected(job.cluster):  # one Ray for all stages: it takes seconds to start
        for number, (stage, planned) in enumerate(stages, start=1):
            title = f"[{number}/{len(stages)}] {stage.name}"
            if planned.is_done:
                console.print(f"{title}: already done", markup=False, highlight=False)
            else:
                console.rule(f"{title}: {stage.kind}".replace("[", r"\["), align="left")
            artifact = run_stage(planned)
    assert artifact is not None
    print(f"artifact: {artifact.folder}", flush=True)


def print_plan(job: JobSpec, storage: Location) -> None:
    """Show which stages would run, and why; nothing is run and Ray is not started."""
    table = Table("stage", "kind", "state", "why", "folder", title=f"plan of {job.name}")
    will_run: set[str] = set()
    for stage, planned in job.plan(storage):
        waiting = sorted(stage.needs & will_run)
        if planned.is_done:
            state, why = "done", "its artifact is there"
        else:
            will_run.add(stage.name)
            state, why = "to run", _why(planned, waiting)
        table.add_row(stage.name, stage.kind, state, why, str(planned.output))
    Console().print(table)


def _why(planned: Planned, waiting: list[str]) -> str:
    if planned.found is not None:
        return {
            "failed": "it failed; it goes on from what it left",
            "running": "it is running, or was killed; it goes on from what it left",
        }[planned.found.status]
    if waiting:
        return f"after {', '.join(waiting)}"
    return "no artifact of this spec and these inputs"


def print_status(job: JobSpec, storage: Location) -> None:
    """Show what has run, from the artifacts alone."""
    table = Table("stage", "state", "started", "took", "figures", "folder", title=job.name)
    for stage, planned in job.plan(storage):
        found = planned.found
        if found is None:
            table.add_row(stage.name, "not run", "", "", "", str(planned.output))
            continue
        took = duration(found.took_s) if found.took_s is not None else ""
        figures = _figures(found.figures)
        table.add_row(stage.name, found.status, found.started_at, took, figures, str(found.folder))
    Console().print(table)


def _figures(figures: dict[str, Any], most: int = 6) -> str:
    """The first scalar figures, as `name value`."""
    scalars = {k: v for k, v in figures.items() if isinstance(v, int | float)}
    shown = [
        f"{name} {value:,.2f}" if isinstance(value, float) else f"{name} {value:,}"
        for name, value in list(scalars.items())[:most]
    ]
    return "  ".join(shown)
