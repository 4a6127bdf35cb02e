"""The search space: checked against the train spec, and handed to Ray Tune."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError, nearest
from pipeline.specs import Range, TrainSpec, TuneSpec
from pipeline.training.metrics import VALID_KEYS

# What a trial's evaluation at its end measures.
EVALUATED = ("negative_elbo", "reconstruction_nll", "kl", "iw_nll", "mutual_information")
EVALUATED_PREFIX = "evaluated_"


def reported_metrics() -> list[str]:
    """What trainings report at each validation."""
    return [f"valid_{key}" for key in VALID_KEYS]


def check_search(spec: TuneSpec) -> None:
    """Check all that can be known before the first trial starts.

    Raises:
        UserError: if a key of the space is unknown or a value of its range is refused by the train
            spec, if trials are elastic, if a metric is never reported, or a grid has more points
            than there are trials.
    """
    if spec.trial.train.is_elastic:
        raise UserError(
            f"train.num_workers={spec.trial.train.num_workers} is refused in a search: its "
            "trials share the cluster, and one that grows takes another's place; give a number."
        )
    for key, bounds in spec.search.space.items():
        for value in bounds.probes():
            try:
                with_settings(spec.trial, {key: value})
            except UserError as error:
                raise UserError(f"search.space: {error.message}") from None
    _check_metrics(spec)
    if spec.search.sampler == "grid":
        _check_grid(spec)


def _check_metrics(spec: TuneSpec) -> None:
    search = spec.search
    during = reported_metrics()
    at_end = [f"{EVALUATED_PREFIX}{name}" for name in EVALUATED]
    if search.metric not in during:
        raise UserError(
            f"search.metric={search.metric} is never reported while a trial trains"
            f"{nearest(search.metric, during)}; what is: {', '.join(during)}."
        )
    for name in search.objectives:
        if name not in during + at_end:
            raise UserError(
                f"search.objectives: {name} is never reported{nearest(name, during + at_end)}; "
                f"what is: {', '.join(during + at_end)}."
            )


def _check_grid(spec: TuneSpec) -> None:
    ranges = spec.search.space
    for key, bounds in ranges.items():
        if bounds.choice is None:
            raise UserError(
                f"search.space: {key} has no choice, but sampler=grid tries every value: give "
                "{choice: [...]}, or another sampler."
            )
    points = spec.planned_trials
    if points > spec.num_trials:
        raise UserError(
            f"the grid has {points} points, but num_trials={spec.num_trials}: some would be left "
            f"out; set num_trials={points}, or give fewer values."
        )


def with_settings(trial: TrainSpec, settings: Mapping[str, Any]) -> TrainSpec:
    """The train spec with dotted keys replaced.

    Raises:
        UserError: if a key is not one of the spec's, or its value is refused.
    """
    values = trial.model_dump(mode="python")
    for key, value in settings.items():
        node = values
        *sections, last = key.split(".")
        for section in sections:
            if not isinstance(node.get(section), dict):
                raise UserError(f"unknown key '{key}'{nearest(section, node)}.")
            node = node[section]
        if last not in node:
            raise UserError(
                f"unknown key '{key}'{nearest(last, node)}; the keys there are: {', '.join(node)}."
            )
        node[last] = value
    return TrainSpec.build(values, "trial")


def tune_domains(space: Mapping[str, Range], grid: bool = False) -> dict[str, Any]:
    """The space as Ray Tune's own domains."""
    from ray import tune

    def domain(bounds: Range) -> Any:
        if bounds.uniform:
            return tune.uniform(*bounds.uniform)
        if bounds.loguniform:
            return tune.loguniform(*bounds.loguniform)
        if bounds.integer:
            low, high = bounds.integer
            return tune.randint(low, high + 1)
        values = bounds.choice or []
        return tune.grid_search(values) if grid else tune.choice(values)

    return {key: domain(bounds) for key, bounds in space.items()}
