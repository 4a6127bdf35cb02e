"""The search space: checked against the train spec, and handed to Ray Tune."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError, nearest
from pipeline.specs import Range, TrainSpec, TuneSpec


def check_space(spec: TuneSpec) -> None:
    """Build the train spec at every end of every range, before the first trial starts.

    Raises:
        UserError: naming the key, and the nearest right one when it is unknown.
    """
    for key, bounds in spec.search.space.items():
        for value in _ends(bounds):
            try:
                with_settings(spec.trial, {key: value})
            except UserError as error:
                raise UserError(f"search.space: {error.message}") from None


def _ends(bounds: Range) -> list[Any]:
    return list(bounds.choice or bounds.uniform or bounds.loguniform or bounds.integer or ())


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


def tune_domains(space: Mapping[str, Range]) -> dict[str, Any]:
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
        return tune.choice(bounds.choice or [])

    return {key: domain(bounds) for key, bounds in space.items()}
