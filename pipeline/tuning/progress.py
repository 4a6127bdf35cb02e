"""What a person sees while a search runs."""

from __future__ import annotations

from typing import Any, ClassVar

from ray.tune import Callback

from pipeline.progress import Progress


class SearchProgress(Callback):
    """Counts ended trials, and shows the newest figure of the running ones.

    Tune pickles callbacks and a restored search brings its own, so the live bar hangs on the class:
    Tune calls it in the process that set it.
    """

    shown: ClassVar[Progress | None] = None

    def __init__(self) -> None:
        self._ended: set[str] = set()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        """A validation of a trial."""
        del iteration, trials
        figure = result.get("valid_negative_elbo")
        self._show(trial=trial.trial_id, step=result.get("step"), negative_elbo=figure)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial that ended, or was stopped early."""
        del iteration, trials
        self._ended.add(trial.trial_id)
        self._show()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial that failed."""
        del iteration, trials
        self._ended.add(trial.trial_id)
        self._show(failed=trial.trial_id)

    def _show(self, **notes: Any) -> None:
        if self.shown is not None:
            self.shown.update(len(self._ended), **notes)
