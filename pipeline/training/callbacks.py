"""What Ray Train's controller calls while a run goes on."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from pipeline.errors import user_error_within


class StopOnUserError(UserCallback):
    """Ends a run at a `UserError` of a worker: starting it again would only meet it again.

    An exception raised here is a failure of the controller, which Ray Train does not try again.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the first user error among the workers' exceptions."""
        del run_context
        for error in worker_exceptions.values():
            reason = user_error_within(error)
            if reason is not None:
                raise reason


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
