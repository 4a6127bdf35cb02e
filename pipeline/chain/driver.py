"""Running a job: its stages in order, side by side where they fit, each in a process of its own.

What is known of a stage lies in its artifact, so a chain that was killed goes on where it was, and
two chains that share stages share their results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

from pipeline.artifact import Artifact, now
from pipeline.chain.job_spec import JobSpec, JobStage, Undetermined
from pipeline.chain.launch import Started, start
from pipeline.chain.room import Share, room_beside, share_of
from pipeline.chain.stage_log import StageLog
from pipeline.chain.stage_process import Request
from pipeline.errors import UserError
from pipeline.lease import holder_of
from pipeline.progress import duration
from pipeline.runner import Label, Planned
from pipeline.storage import Location

State = Literal["already done", "done", "failed", "skipped", "not run"]
_INTERRUPTED, _USER_ERROR = 130, 2
_TICK_S = 0.1


@dataclass(frozen=True)
class Selection:
    """Which stages of a job are run; a name is one stage's, or that of all copies of an entry."""

    start: str | None = None  # this one and all that need it
    only: Sequence[str] = ()  # these alone
    force: Sequence[str] = ()  # these although they are done

    def chosen(self, job: JobSpec) -> list[JobStage]:
        """The stages to look at, in the job's order.

        Raises:
            UserError: if one is not there, or `from` and `only` are both given.
        """
        for name in (*([self.start] if self.start else []), *self.only, *self.force):
            job.named(name)
        if self.start and self.only:
            raise UserError(
                f"from={self.start} and only={','.join(self.only)} exclude each other: from= takes "
                "a stage and all that need it, only= takes the named ones; give one."
            )
        if self.only:
            return [stage for stage in job.stages if stage.is_among(self.only)]
        if self.start:
            first = job.named(self.start)
            names = {stage.name for stage in first} | job.dependants(first)
            return [stage for stage in job.stages if stage.name in names]
        return list(job.stages)


@dataclass
class Attempt:
    """A stage that is running, or waits for its next try."""

    stage: JobStage
    planned: Planned
    share: Share
    number: int = 1
    started: Started | None = None
    since: float = 0.0
    not_before: float = 0.0
    log: StageLog | None = None
    last_error: str = ""


@dataclass
class Outcome:
    """How each stage ended; `errors` says why of those that failed or were skipped."""

    states: dict[str, State] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    only_user_errors: bool = True

    @property
    def failed(self) -> list[str]:
        """Stages that failed."""
        return [name for name, state in self.states.items() if state == "failed"]


class Chain:
    """A job being run, on the Ray that we are connected to.

    Args:
        job: the graph.
        storage: where artifacts lie.
        selection: which stages.
        cluster: what the cluster has.
        gcs_address: of the Ray that the stages shall use.
        say: shows a line; the first argument is the stage that it is from, or None.
    """

    def __init__(
        self,
        job: JobSpec,
        storage: Location,
        selection: Selection,
        cluster: Share,
        gcs_address: str | None,
        say: Callable[[str | None, str], None],
    ) -> None:
        self._job, self._storage, self._selection = job, storage, selection
        self._cluster, self._gcs_address, self._say = cluster, gcs_address, say
        self._waiting = selection.chosen(job)
        self._running: list[Attempt] = []
        self._plan()
        self.outcome = Outcome()

    def _plan(self) -> None:
        planned = self._job.plan(self._storage)
        self._plans: dict[str, Planned | Undetermined] = {s.name: found for s, found in planned}
        self._shares: dict[str, Share] = {}  # each asks the cluster: not at every tick

    def run(self) -> Outcome:
        """Run what is not done yet; a stage that fails holds up those that need it, no others.

        Raises:
            UserError: if a stage's input is not chosen and not done, or the cluster has less than
                a stage needs.
            KeyboardInterrupt: if it was interrupted, or a stage was cancelled.
        """
        self._require_inputs()
        for stage in self._waiting:  # before anything starts
            if not self._plans[stage.name].is_done or stage.is_among(self._selection.force):
                self._share(stage)
        try:
            while self._waiting or self._running:
                self._settle()
                self._start_what_fits()
                self._look_after_running()
                if self._running or self._waiting:
                    time.sleep(_TICK_S)
        except BaseException:
            self._stop_all()
            raise
        return self.outcome

    def _require_inputs(self) -> None:
        chosen = {stage.name for stage in self._waiting}
        for stage in self._waiting:
            for needed in sorted(stage.needs - chosen):
                if not self._plans[needed].is_done:
                    raise UserError(
                        f"stage '{stage.name}' reads '{needed}', which is not done and was left "
                        "out by from= or only=: choose it as well, or run the job without them."
                    )

    def _share(self, stage: JobStage) -> Share:
        if stage.name not in self._shares:
            found = self._plans[stage.name]
            spec = found.spec if isinstance(found, Planned) else stage.spec
            self._shares[stage.name] = share_of(stage, spec, self._cluster)
        return self._shares[stage.name]

    def _settle(self) -> None:
        """Take off the waiting those that are done, and those that can no longer run."""
        states = self.outcome.states
        for stage in list(self._waiting):
            lost = sorted(n for n in stage.needs if states.get(n) in ("failed", "skipped"))
            found = self._plans[stage.name]
            if lost:
                self._end(stage, "skipped", f"needs {', '.join(lost)}")
            elif found.is_done and not stage.is_among(self._selection.force):
                assert isinstance(found, Planned)
                self._say(None, f"{stage.name}: already done  {found.output}")
                self._end(stage, "already done")

    def _end(self, stage: JobStage, state: State, why: str = "") -> None:
        self._waiting = [other for other in self._waiting if other.name != stage.name]
        self.outcome.states[stage.name] = state
        if why:
            self.outcome.errors[stage.name] = why
            self._say(None, f"{stage.name}: {state}: {why}")
        found = self._plans[stage.name]
        artifact = Artifact.find(found.output) if isinstance(found, Planned) else None
        if artifact is not None:
            self.outcome.artifacts[stage.name] = artifact

    def _start_what_fits(self) -> None:
        now_s = time.monotonic()
        for attempt in self._running:
            if attempt.started is None and now_s >= attempt.not_before:
                self._start(attempt)
        busy = {attempt.stage.name for attempt in self._running}
        pending = {stage.name for stage in self._waiting} | busy
        for stage in list(self._waiting):
            found = self._plans[stage.name]
            if stage.needs & pending or isinstance(found, Undetermined):
                continue
            share = self._share(stage)
            room = room_beside((attempt.share for attempt in self._running), self._cluster)
            if self._running and not share.fits(room):
                continue
            attempt = Attempt(stage, found, share, log=StageLog(found.output))
            self._waiting.remove(stage)
            self._running.append(attempt)
            self._start(attempt)

    def _start(self, attempt: Attempt) -> None:
        label = Label(self._job.name, attempt.stage.name)
        force = attempt.stage.is_among(self._selection.force) and attempt.number == 1
        request = Request.of(attempt.planned, label, force)
        attempt.started = start(request, attempt.stage.options, self._gcs_address)
        attempt.since = time.monotonic()
        again = f", attempt {attempt.number}" if attempt.number > 1 else ""
        line = f"{attempt.stage.name}: {attempt.stage.kind} in {attempt.started.where}{again}"
        self._say(None, line)
        assert attempt.log is not None
        attempt.log.write(f"--- {now()} {line}")

    def _look_after_running(self) -> None:
        for attempt in list(self._running):
            if attempt.started is None:
                continue
            code = attempt.started.poll()
            self._pass_on(attempt)
            limit = attempt.stage.options.timeout_s
            took = time.monotonic() - attempt.since
            if code is None and limit is not None and took > limit:
                attempt.started.stop()
                self._pass_on(attempt)
                self._failed(attempt, f"it took longer than timeout_s={limit:g}", False)
            elif code is not None:
                self._ended(attempt, code)

    def _pass_on(self, attempt: Attempt) -> None:
        assert attempt.started is not None
        assert attempt.log is not None
        for line in attempt.started.lines():
            attempt.log.write(line)
            if line.startswith("error: "):
                attempt.last_error = line.removeprefix("error: ")
            self._say(attempt.stage.name, line)

    def _ended(self, attempt: Attempt, code: int) -> None:
        artifact = Artifact.find(attempt.planned.output)
        if artifact is not None and artifact.status == "done":
            self._close(attempt)
            self._plan()  # a search that is done settles others' specs
            self._say(None, f"{attempt.stage.name}: done in {duration(artifact.took_s or 0)}")
            self._end(attempt.stage, "done")
        elif code == _INTERRUPTED:
            self._close(attempt)
            raise KeyboardInterrupt
        else:
            why = attempt.last_error or (artifact.error if artifact else None) or ""
            if code < 0:
                why = f"its process was ended by signal {-code}"
            self._failed(attempt, why or f"it left with exit code {code}", code == _USER_ERROR)

    def _failed(self, attempt: Attempt, why: str, by_user: bool) -> None:
        options = attempt.stage.options
        # What the user has to put right would only be met again.
        if attempt.number <= options.retries and not by_user:
            pause = options.backoff_s * 2 ** (attempt.number - 1)
            self._say(None, f"{attempt.stage.name}: {why}; tried again in {duration(pause)}")
            attempt.started, attempt.number = None, attempt.number + 1
            attempt.not_before = time.monotonic() + pause
            return
        self._record_failure(attempt.planned, why)
        self._close(attempt)
        self.outcome.only_user_errors &= by_user
        self._end(attempt.stage, "failed", why)

    def _record_failure(self, planned: Planned, why: str) -> None:
        """Complete the record of a stage that could not do so itself."""
        found = Artifact.find(planned.output)
        if found is None or found.status == "done" or holder_of(planned.output) is not None:
            return
        if found.status != "failed" or not found.error:
            replace(found, status="failed", finished_at=now(), error=why).save()

    def _close(self, attempt: Attempt) -> None:
        self._running.remove(attempt)
        if attempt.log is not None:
            attempt.log.flush()

    def _stop_all(self) -> None:
        alive = [a for a in self._running if a.started is not None and a.started.poll() is None]
        for attempt in alive:
            self._say(None, f"{attempt.stage.name}: stopping")
        with ThreadPoolExecutor(max(len(alive), 1)) as pool:
            list(pool.map(lambda attempt: attempt.started.stop(), alive))
        for attempt in list(self._running):
            if attempt.started is not None:
                self._pass_on(attempt)
            self._close(attempt)
