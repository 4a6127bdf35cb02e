"""How one stage of a job is run: where, with what, how often it is tried, how long it may take."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pipeline.specs.base import Spec


class ResourcesSpec(Spec):
    """What a stage takes of the cluster while it runs, and what the driver of its Ray job takes."""

    # Stages run side by side as long as these fit; None: what its spec asks for.
    cpus: float | None = Field(None, ge=0)
    gpus: float | None = Field(None, ge=0)
    # With submit: which node the driver may run on. A driver computes nothing on a GPU.
    driver_cpus: float = Field(0.0, ge=0)
    driver_memory_bytes: int | None = Field(None, gt=0)
    driver_custom: dict[str, float] = Field(default_factory=dict)


class StageOptions(Spec):
    """Keys of a stage's entry that are no part of its identity."""

    submit: bool = False  # as a Ray job of its own, through the Jobs API
    retries: int = Field(0, ge=0)
    backoff_s: float = Field(5.0, ge=0)  # before the first retry; doubled for each further one
    timeout_s: float | None = Field(None, gt=0)  # of one attempt
    resources: ResourcesSpec = ResourcesSpec()
    runtime_env: dict[str, Any] = Field(default_factory=dict)  # with submit: over the chain's own
