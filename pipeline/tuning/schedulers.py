"""Which trials are stopped early: Ray Tune's rules, none of which cuts a trial at its end."""

from __future__ import annotations

import math
from typing import Any

from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from pipeline.shards import Dataset
from pipeline.specs import TrainSpec, TuneSpec
from pipeline.storage import Location
from pipeline.training.model import count_steps
from pipeline.training.setup import batch_order
from pipeline.tuning.space import with_settings

_TIME = "training_iteration"  # validations that a trial has reported
_NEVER = 1_000_000  # validations: more than a trial has


class _SparesTheEnd(TrialScheduler):
    """At its last validation a trial has nothing left to save, but an evaluation to come.

    Stopped there, it would lack the figures that are measured at a trial's end.
    """

    def watch(self, trial: TrainSpec, dataset: Location) -> None:
        """Tell what trials have in common: their settings and dataset say when they end."""
        self._trial, self._dataset = trial, dataset
        self._last: dict[str, int] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stop where the rule says so and the trial is not at its end.

        The median rule would also pause trials until others have caught up; each would have to
        start its workers again, so they go on.
        """
        decision = super().on_trial_result(tune_controller, trial, result)
        stops = decision == TrialScheduler.STOP and result[_TIME] < self._last_validation(trial)
        return TrialScheduler.STOP if stops else TrialScheduler.CONTINUE

    def _last_validation(self, trial: Any) -> int:
        if trial.trial_id not in self._last:
            settings = with_settings(self._trial, trial.config)
            self._last[trial.trial_id] = num_validations(settings, self._dataset)
        return self._last[trial.trial_id]


class _Asha(_SparesTheEnd, ASHAScheduler):
    """Asynchronous successive halving (Li et al. 2020)."""


class _Median(_SparesTheEnd, MedianStoppingRule):
    """Stops what is worse than the median of the trials before (Golovin et al. 2017)."""


def scheduler(spec: TuneSpec, dataset: Location) -> TrialScheduler:
    """The rule of `search.scheduler`, over the validations of a trial."""
    search = spec.search
    compared = {"time_attr": _TIME, "metric": search.metric, "mode": search.mode}
    grace = search.grace_evaluations
    if search.scheduler == "none":
        return FIFOScheduler()
    rule: _SparesTheEnd
    if search.scheduler == "asha":
        factor = search.reduction_factor
        rule = _Asha(max_t=_NEVER, grace_period=grace, reduction_factor=factor, **compared)
    else:
        fewest = search.median_trials
        rule = _Median(grace_period=grace, min_samples_required=fewest, **compared)
    rule.watch(spec.trial, dataset)
    return rule


def num_validations(spec: TrainSpec, dataset: Location) -> int:
    """How many validations a whole training reports."""
    steps = spec.train.max_steps
    if steps is None or spec.train.max_epochs is not None:
        steps = count_steps(spec, batch_order(spec, Dataset.open(dataset).split("train")))
    return max(math.ceil(steps / spec.train.eval_every), 1)
