"""What the tune stage does: the search space over a train spec, and the budget."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.specs.base import NotIdentity, Spec
from pipeline.specs.cluster import ClusterSpec
from pipeline.specs.train import TrainSpec


class Range(Spec):
    """What one key of the train spec may be: exactly one of the four kinds."""

    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = None  # both ends included
    choice: list[float | int | str | bool] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(
                f"a range is one of uniform, loguniform, integer or choice, got {kinds or 'none'}"
            )
        bounds = self.uniform or self.loguniform or self.integer
        if bounds and not bounds[0] < bounds[1]:
            raise ValueError(f"a range goes from low to high, got {list(bounds)}")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"a loguniform range starts above 0, got {list(self.loguniform)}")
        if self.choice is not None and not self.choice:
            raise ValueError("a choice needs at least one value, got none")
        return self


class SearchSpec(Spec):
    """How the search goes: the sampler, the early stopping, what is compared."""

    space: dict[str, Range]  # key of the train config, dotted -> its range
    sampler: Literal["optuna", "random"] = "optuna"
    scheduler: Literal["asha", "none"] = "asha"
    grace_evaluations: int = Field(1, gt=0)  # validations before a trial may be stopped
    reduction_factor: int = Field(3, gt=1)
    metric: str = "valid_negative_elbo"
    mode: Literal["min", "max"] = "min"
    seed: int = 0


class TuneSpec(Spec):
    """One run of the tune stage. Its input is a dataset artifact."""

    num_trials: int = Field(4, gt=0)
    search: SearchSpec
    trial: TrainSpec  # what all trials share
    max_concurrent: Annotated[int | None, NotIdentity] = Field(None, gt=0)  # None: what fits
    cluster: Annotated[ClusterSpec, NotIdentity] = ClusterSpec()
