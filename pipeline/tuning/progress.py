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

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self._ended: set[str] = set()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        """A validation of a trial."""
        del iteration
        name = self._metric.removeprefix("valid_")
        figure = result.get(self._metric)
        self._show(trials, trial=trial.trial_id, step=result.get("step"), **{name: figure})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial that ended, or was stopped early."""
        del iteration
        self._ended.add(trial.trial_id)
        self._show(trials)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial that failed."""
        del iteration
        self._ended.add(trial.trial_id)
        self._show(trials, failed=trial.trial_id)

    def _show(self, trials: list[Any], **notes: Any) -> None:
        if self.shown is not None:
            ended = self._ended | {t.trial_id for t in trials if t.is_finished()}
            self.shown.update(len(ended), **notes)
