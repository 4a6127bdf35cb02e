"""What the evaluate stage does: which figures, from how many samples, on which split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.specs.base import NotIdentity, Spec
from pipeline.specs.cluster import ClusterSpec


class EvaluationSpec(Spec):
    """The figures of one evaluation."""

    seed: int = 0
    iw_samples: int = Field(20, gt=0)  # K of the importance-weighted bound
    max_documents: int | None = Field(None, gt=0)  # the split's first; None: all
    batch_tokens: Annotated[int, NotIdentity] = Field(8192, gt=0)
    num_workers: Annotated[int | None, NotIdentity] = Field(None, gt=0)  # None: what there is
    use_gpu: Annotated[bool | Literal["auto"], NotIdentity] = "auto"
    num_samples: int = Field(8, ge=0)  # sentences sampled from the prior
    num_reconstructions: int = Field(4, ge=0)
    sample_max_tokens: int = Field(64, gt=0)
    sample_top_p: float = Field(0.95, gt=0, le=1)


class EvaluateSpec(Spec):
    """One run of the evaluate stage. Its inputs are weights and a dataset."""

    split: Literal["train", "valid", "test"] = "test"
    evaluate: EvaluationSpec = EvaluationSpec()
    cluster: Annotated[ClusterSpec, NotIdentity] = ClusterSpec()
