"""What a search may spend beside its number of trials: optimizer steps, and time."""

from __future__ import annotations

import time
from typing import Any

from ray.tune import Stopper

from pipeline.storage import Location
from pipeline.training.metrics import read_rows

_SPENT = "spent.json"


class Budget(Stopper):
    """Ends the search when its steps or its time are used up; what ran before a kill counts.

    Args:
        output: the search's folder, where `spent.json` keeps the time.
        max_steps: optimizer steps over all trials, or None.
        max_time_s: seconds of search, or None.
    """

    def __init__(self, output: Location, max_steps: int | None, max_time_s: float | None) -> None:
        self._output, self._max_steps, self._max_time_s = output, max_steps, max_time_s
        self._steps: dict[str, int] | None = None  # of each trial
        self._time_before_s = self._since = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Without what was spent: a restored search reads that from what it finds."""
        return self.__dict__ | {"_steps": None}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Count a trial's report; it is never stopped alone."""
        steps = self._counted()
        steps[trial_id] = max(steps.get(trial_id, 0), int(result.get("step") or 0))
        (self._output / _SPENT).write_json({"time_s": self._time_s(), "steps": sum(steps.values())})
        return False

    def stop_all(self) -> bool:
        """Whether the budget is used up."""
        steps = sum(self._counted().values())
        if self._max_steps is not None and steps >= self._max_steps:
            return True
        return self._max_time_s is not None and self._time_s() >= self._max_time_s

    def _time_s(self) -> float:
        return self._time_before_s + time.monotonic() - self._since

    def _counted(self) -> dict[str, int]:
        if self._steps is None:
            spent = self._output / _SPENT
            self._time_before_s = spent.read_json()["time_s"] if spent.is_file() else 0.0
            self._since = time.monotonic()
            folders = (self._output / "trials").children()
            self._steps = {folder.name: last_step(folder) for folder in folders}
        return self._steps


def last_step(trial: Location) -> int:
    """The last optimizer step that a trial's folder tells of; 0 before the first."""
    return max((int(row["step"]) for row in read_rows(trial)), default=0)
