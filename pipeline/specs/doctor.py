"""What the doctor looks at: a cluster, and the training that it is to carry."""

from __future__ import annotations

from pydantic import Field

from pipeline.specs.base import Spec
from pipeline.specs.cluster import ClusterSpec
from pipeline.specs.train import DeepSpeedSpec, ModelSpec, OptimizationSpec, TrainSpec


class DoctorSpec(Spec):
    """One look at a cluster."""

    model: ModelSpec
    train: OptimizationSpec
    deepspeed: DeepSpeedSpec = DeepSpeedSpec()
    cluster: ClusterSpec = ClusterSpec()
    vocab_size: int = Field(50_257, gt=0)  # of the model, where no dataset tells it
    collective_bytes: int = Field(64_000_000, ge=4)  # of the tensor that the workers sum

    @property
    def training(self) -> TrainSpec:
        """The training whose needs are estimated."""
        return TrainSpec(
            model=self.model, train=self.train, deepspeed=self.deepspeed, cluster=self.cluster
        )
