"""What the tune stage does: the search space over a train spec, what is compared, the budget."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from pipeline.specs.base import NotIdentity, Spec
from pipeline.specs.cluster import ClusterSpec
from pipeline.specs.train import TrainSpec

Mode = Literal["min", "max"]


# Of a trial's driver, bytes. It waits for its workers, so it takes no CPU: a tenth of one would
# keep a second trial off a machine of two cores.
DRIVER_MEMORY = 512 * 2**20
TRIAL_EPOCHS = 1  # of a trial whose length nobody gives


class Range(Spec):
    """What one key of the train spec may be: exactly one of the four kinds."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = Field(None, alias="int")  # both ends included
    choice: list[float | int | str | bool] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(
                f"a range is one of uniform, loguniform, int or choice, got {kinds or 'none'}"
            )
        bounds = self.uniform or self.loguniform or self.integer
        if bounds and not bounds[0] < bounds[1]:
            raise ValueError(f"a range goes from low to high, got {list(bounds)}")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"a loguniform range starts above 0, got {list(self.loguniform)}")
        if self.choice is not None and not self.choice:
            raise ValueError("a choice needs at least one value, got none")
        return self

    def probes(self) -> list[Any]:
        """Values that stand for the whole range: its ends, and one between that is not round."""
        if self.choice is not None:
            return list(self.choice)
        if self.integer is not None:
            return list(self.integer)
        low, high = self.uniform or self.loguniform or (0.0, 0.0)
        return [low, low + 0.3819660113 * (high - low), high]


class SearchSpec(Spec):
    """How the search goes: the sampler, the early stopping, what is compared."""

    space: dict[str, Range]  # key of the train config, dotted -> its range
    sampler: Literal["optuna", "random", "grid"] = "optuna"
    scheduler: Literal["asha", "median", "none"] = "asha"
    grace_evaluations: int = Field(1, gt=0)  # validations before a trial may be stopped
    reduction_factor: int = Field(3, gt=1)  # asha: one trial of so many goes on
    median_trials: int = Field(3, gt=1)  # median: trials that must be there to compare with
    # What the scheduler compares while trials run.
    metric: str = "valid_negative_elbo"
    mode: Mode = "min"
    # What the sampler improves and the result is judged by, the first one first; {}: the metric.
    # Names that start with `evaluated_` are measured on the validation split when a trial ends.
    objectives: dict[str, Mode] = Field(default_factory=dict)
    evaluate_documents: int = Field(500, gt=0)
    evaluate_iw_samples: int = Field(20, gt=0)
    seed: int = 0

    @property
    def goals(self) -> dict[str, Mode]:
        """What the result is judged by."""
        return self.objectives or {self.metric: self.mode}


class TuneSpec(Spec):
    """One run of the tune stage. Its input is a dataset artifact."""

    num_trials: int = Field(4, gt=0)
    # Budgets beside the number of trials: optimizer steps over all trials, and seconds of search.
    max_total_steps: int | None = Field(None, gt=0)
    max_time_s: float | None = Field(None, gt=0)
    search: SearchSpec
    trial: TrainSpec  # what all trials share
    max_concurrent: Annotated[int | None, NotIdentity] = Field(None, gt=0)  # None: what fits
    cluster: Annotated[ClusterSpec, NotIdentity] = ClusterSpec()

    @property
    def planned_trials(self) -> int:
        """How many trials there will be: `num_trials`, or the points of a grid."""
        if self.search.sampler != "grid":
            return self.num_trials
        return math.prod(len(bounds.choice or ()) for bounds in self.search.space.values())
