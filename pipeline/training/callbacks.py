"""What Ray Train's controller and workers call while a run goes on."""

from __future__ import annotations

import time
from typing import Any

from ray.train import UserCallback

# Ray's public callback hears of exceptions alone: not of a new start of the workers, of a change
# in their number, or of a worker's main thread.
from ray.train.v2._internal.execution.callback import (
    ControllerCallback,
    WorkerCallback,
    WorkerGroupCallback,
)
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor

from pipeline.errors import error_within, user_error_within
from pipeline.progress import ProgressMailbox
from pipeline.training.notice import InterruptedRunError, Notice, handle_sigterm


class BudgetSpentError(Exception):
    """The workers ended more often than the config allows.

    Of no kind that Ray Train knows: it would start them again.
    """


class Budgets(WorkerGroupCallback):
    """Decides, when workers have ended with an error, whether the run goes on.

    It ends at a `UserError`, which starting again would only meet again; when the driver asked for
    it; and when there were more preemptions, or more faults, than the config allows. An exception
    raised here is a failure of the controller, which Ray Train does not try again.

    Args:
        max_failures: how many faults are made good; -1: any number.
        max_preemptions: how many preemptions are; -1: any number.
        mailbox: where the driver hears of each.
    """

    def __init__(
        self, max_failures: int, max_preemptions: int, mailbox: ProgressMailbox | None
    ) -> None:
        self._limits = {"failures": max_failures, "preemptions": max_preemptions}
        self._counts = dict.fromkeys(self._limits, 0)
        self._mailbox = mailbox
        self._counted = False  # one end of the workers is told of at several looks

    def after_worker_group_start(self, worker_group: Any) -> None:
        """A new start: what ends it is counted anew."""
        del worker_group
        self._counted = False

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Raise what ends the run."""
        errors = list(worker_group_status.errors.values())
        for error in errors:
            reason = user_error_within(error)
            if reason is not None:
                raise reason
        interruptions = [e for e in (error_within(e, InterruptedRunError) for e in errors) if e]
        if any(interruption.notice is Notice.STOPPED for interruption in interruptions):
            raise interruptions[0]
        if errors and not self._counted:
            self._counted = True
            if self._mailbox is not None:
                self._mailbox.set_training(False)  # a worker that was killed has not said so
            if all(i.notice is not Notice.RESIZE for i in interruptions):
                was_preempted = bool(interruptions) or any(map(_is_preempted_actor, errors))
                self._count("preemptions" if was_preempted else "failures", worker_group_status)

    def _count(self, kind: str, status: Any) -> None:
        self._counts[kind] += 1
        count, limit = self._counts[kind], self._limits[kind]
        if 0 <= limit < count:
            raise BudgetSpentError(
                f"the workers ended {count} times, but train.max_{kind}={limit}; the last time: "
                f"{status.get_error_string()}"
            )
        allowed = "" if limit < 0 else f" of {limit}"
        what = "were preempted" if kind == "preemptions" else "failed"
        self._say(
            f"warning: workers {what} ({count}{allowed}, train.max_{kind}); they are started again "
            "from the last checkpoint"
        )

    def _say(self, text: str) -> None:
        if self._mailbox is not None:
            self._mailbox.say(text)


class CheckpointBeforeResize(ControllerCallback):
    """Lets the workers write a checkpoint before their number changes, so that no step is lost.

    Ray Train ends the workers at once when it decides on another number of them.

    Args:
        mailbox: how the workers are asked, and answer.
        grace_s: how long they are waited for.
    """

    def __init__(self, mailbox: ProgressMailbox, grace_s: float) -> None:
        self._mailbox, self._grace_s = mailbox, grace_s

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Ask for a checkpoint where workers run, and wait until they are done with it."""
        del resize_decision
        if not self._mailbox.is_training():
            return
        self._mailbox.ask(Notice.RESIZE.name)
        deadline = time.monotonic() + self._grace_s
        while self._mailbox.is_training() and time.monotonic() < deadline:
            time.sleep(0.1)
        self._mailbox.ask(None)


class SigtermIsNotice(WorkerCallback):
    """Makes a SIGTERM to a worker a notice; Ray's own handler would end it at once."""

    def after_init_train_context(self) -> None:
        """Set the handler; Ray calls this on the worker's main thread."""
        handle_sigterm()


class OnValidation(UserCallback):
    """Passes on the reports that carry a validation, and no others.

    A search compares trials report by report, and knows nothing of a report that only holds a
    checkpoint.
    """

    def __init__(self, inner: UserCallback) -> None:
        self._inner = inner

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Pass on a validation's report."""
        if "valid_negative_elbo" in metrics[0]:
            self._inner.after_report(run_context, metrics, checkpoint)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Pass on what happened."""
        self._inner.after_exception(run_context, worker_exceptions)
