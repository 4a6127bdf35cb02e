"""What `jobs/run.py` does with a job: run it, show it, stop it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console

from jobs.job_table import print_plan, print_status
from pipeline.chain.driver import Chain, Outcome, Selection
from pipeline.chain.job_spec import JobSpec
from pipeline.chain.kuberay import manifest
from pipeline.chain.room import whole_cluster
from pipeline.chain.stage_log import read_log
from pipeline.cluster import connected
from pipeline.errors import UserError
from pipeline.lease import holder_of, request_cancel
from pipeline.runner import Planned
from pipeline.specs.render import RenderSpec
from pipeline.storage import Location

_CANCEL_S = 60.0


def plan(job: JobSpec, storage: Location, selection: Selection) -> None:
    """Show what would run."""
    print_plan(job, storage, selection)


def status(job: JobSpec, storage: Location, selection: Selection) -> None:
    """Show what ran."""
    selection.chosen(job)  # a misspelt stage is an error here as well
    print_status(job, storage)


def run(job: JobSpec, storage: Location, selection: Selection) -> None:
    """Run what is not done; the last line is the folder of the last stage."""
    chosen = selection.chosen(job)
    plans = {stage.name: found for stage, found in job.plan(storage)}
    done = {name: p for name, p in plans.items() if isinstance(p, Planned) and p.is_done}
    if all(stage.name in done for stage in chosen) and not selection.force:
        for stage in chosen:
            Console().print(
                f"{stage.name}: already done  {done[stage.name].output}", soft_wrap=True
            )
        print(f"artifact: {done[chosen[-1].name].output}", flush=True)
        return
    with connected(job.cluster):
        import ray

        address = ray.get_runtime_context().gcs_address
        several = len(chosen) > 1
        chain = Chain(job, storage, selection, whole_cluster(), address, _Lines(several).show)
        outcome = chain.run()
    _conclude(job, outcome, chosen[-1].name)


class _Lines:
    """Shows lines of stages; where they come from stands before them when it changes."""

    def __init__(self, several: bool) -> None:
        self._several = several
        self._last: str | None = None

    def show(self, stage: str | None, line: str) -> None:
        """Show a line of a stage, or one of the chain's own."""
        if stage is None:
            print(f"[{line}]" if self._several else line, flush=True)
        elif stage != self._last and self._several:
            print(f"[{stage}]", flush=True)
        if stage is not None:
            print(line, flush=True)
        self._last = stage


def _conclude(job: JobSpec, outcome: Outcome, last: str) -> None:
    if not outcome.failed:
        print(f"artifact: {outcome.artifacts[last].folder}", flush=True)
        return
    skipped = [name for name, state in outcome.states.items() if state == "skipped"]
    reasons = "; ".join(f"{name}: {outcome.errors[name]}" for name in outcome.failed)
    held_up = f" (not run, since they need it: {', '.join(skipped)})" if skipped else ""
    message = f"job {job.name}: {len(outcome.failed)} stage(s) failed: {reasons}{held_up}"
    if outcome.only_user_errors:
        raise UserError(message)
    print(f"error: {message}; action=logs shows what they printed.", file=sys.stderr)
    sys.exit(1)


def logs(job: JobSpec, storage: Location, selection: Selection) -> None:
    """Print what the stages printed."""
    chosen = {stage.name for stage in selection.chosen(job)}
    for stage, found in job.plan(storage):
        if stage.name not in chosen or not isinstance(found, Planned):
            continue
        text = read_log(found.output)
        print(f"[{stage.name}]\n{text or '(it has printed nothing)'}", flush=True)


def cancel(job: JobSpec, storage: Location, selection: Selection) -> None:
    """Ask whoever runs stages of the job to stop, wherever that is, and wait until they have."""
    chosen = {stage.name for stage in selection.chosen(job)}
    asked = {}
    for stage, found in job.plan(storage):
        holder = holder_of(found.output) if isinstance(found, Planned) else None
        if stage.name in chosen and holder is not None and isinstance(found, Planned):
            request_cancel(found.output, holder)
            asked[stage.name] = (found.output, holder.name)
            print(f"{stage.name}: asked {holder.holder} to stop", flush=True)
    if not asked:
        print("nothing of this job is running", flush=True)
    until = time.monotonic() + _CANCEL_S
    while asked and time.monotonic() < until:
        time.sleep(0.5)
        for name, (folder, claim) in list(asked.items()):
            now = holder_of(folder)
            if now is None or now.name != claim:
                del asked[name]
                print(f"{name}: stopped", flush=True)
    if asked:
        raise UserError(
            f"{', '.join(asked)} did not stop within {_CANCEL_S:.0f} s: expected an answer at its "
            "next heartbeat; its machine may be gone, then the next run takes over."
        )


def render(job: JobSpec, storage: str, spec: RenderSpec, arguments: Sequence[str]) -> None:
    """Print the job as a manifest for KubeRay; `arguments` are those of this command."""
    kept = [a for a in arguments if not a.startswith(("action=", "render."))]
    print(manifest(job.name, kept, storage, spec), end="", flush=True)


ACTIONS = {"run": run, "plan": plan, "status": status, "logs": logs, "cancel": cancel}
