"""How much each setting of a search mattered."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from pipeline.specs import Range, TuneSpec
from pipeline.specs.tune import Mode
from pipeline.tuning.results import TrialResult

_AT_LEAST = 4  # trials; of fewer nothing can be told


def importances(
    spec: TuneSpec, trials: Sequence[TrialResult], goal: str, mode: Mode
) -> dict[str, float]:
    """Share of each key, the greatest first, by PED-ANOVA (Watanabe et al., IJCAI 2023).

    It compares how a setting is distributed among the best trials with how it is among all; the
    shares add up to 1. {} when there are too few trials, or all have one value.
    """
    import optuna

    values = [trial.values[goal] for trial in trials]
    if len(trials) < _AT_LEAST or len(set(values)) < 2:
        return {}
    distributions = {key: _distribution(bounds) for key, bounds in spec.search.space.items()}
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(direction="minimize" if mode == "min" else "maximize")
            for trial in trials:
                study.add_trial(
                    optuna.trial.create_trial(
                        params={key: trial.settings[key] for key in distributions},
                        distributions=distributions,
                        value=trial.values[goal],
                    )
                )
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(
                target_quantile=max(0.1, 2 / len(trials))
            )
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(before)
    return {key: float(share) for key, share in found.items()}


def _distribution(bounds: Range) -> Any:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if bounds.uniform is not None:
        return FloatDistribution(*bounds.uniform)
    if bounds.loguniform is not None:
        return FloatDistribution(*bounds.loguniform, log=True)
    if bounds.integer is not None:
        return IntDistribution(*bounds.integer)
    return CategoricalDistribution(bounds.choice or [])
