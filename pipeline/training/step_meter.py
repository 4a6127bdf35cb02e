"""The row of metrics of the steps since the last one: their sums, and where their time went."""

from __future__ import annotations

import time
from typing import Any

from pipeline.training.checkpoint import MeterState, RunState
from pipeline.training.engine import grad_norm
from pipeline.training.loader import StepBatch, TrainLoader
from pipeline.training.meter import Meter
from pipeline.training.setup import Run


class StepMeter:
    """Sums and times of the steps since the last row.

    Args:
        run: whose steps.
        start: what a checkpoint between two rows kept of them.
    """

    def __init__(self, run: Run, start: MeterState) -> None:
        self._run = run
        self.sums = Meter(run.num_layers, run.device)
        self.sums.restore(start.sums)
        self._steps = start.steps
        self._waited_s = self._loader_waited_s = 0.0
        self._clock = time.perf_counter() - start.took_s

    @property
    def state(self) -> MeterState:
        """What a checkpoint keeps, so that the next row is the one of an uninterrupted run."""
        return MeterState(self.sums.local, self._steps, time.perf_counter() - self._clock)

    def restart_clock(self) -> None:
        """Leave out the time since the last step ended: it was no training."""
        self._clock = time.perf_counter()

    def timed(self, loader: TrainLoader) -> StepBatch:
        """The next batch; counts the time that passes until the row as this step's."""
        batch = loader.next()
        self._waited_s += loader.waited_s - self._loader_waited_s
        self._loader_waited_s = loader.waited_s
        self._steps += 1
        return batch

    def row(self, state: RunState) -> dict[str, Any] | None:
        """The row of metrics of the steps since the last one. A collective call.

        None where none of them made an update: they have no figures.
        """
        means = self.sums.reduced()
        took_s = max(time.perf_counter() - self._clock, 1e-9)
        last = state.step - 1  # the step that was made last
        row: dict[str, Any] = {
            "kind": "train",
            "step": state.step,
            "epoch": state.position.epoch,
            **means,
            "beta": self._run.beta(last),
            "learning_rate": self._run.learning_rate(last),
            "grad_norm": grad_norm(self._run.engine),
            "tokens_per_s": means["num_tokens"] / took_s,
            "step_s": took_s / self._steps,
            "data_wait_s": self._waited_s / self._steps,
            "time_s": state.time_s,
            "documents_seen": state.documents,
            "tokens_seen": state.tokens,
            "steps_skipped": state.skipped,
        }
        self._steps, self._waited_s = 0, 0.0
        self.restart_clock()
        return row if means["num_documents"] else None
