"""What the evaluate stage does: which figures, from how many samples, on which split."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.specs.base import NotIdentity, Spec
from pipeline.specs.cluster import ClusterSpec

Positive = Annotated[int, Field(gt=0)]


class EvaluationSpec(Spec):
    """The figures of one evaluation."""

    seed: int = Field(0, ge=0)
    max_documents: int | None = Field(None, gt=0)  # the split's first; None: all

    # Likelihood: K of the importance-weighted bound, on every document; and the Ks of the curve,
    # on some, since its last point costs K passes a document.
    iw_samples: int = Field(100, gt=0)
    iw_curve: tuple[Positive, ...] = (1, 10, 100, 1000)
    iw_curve_documents: int = Field(50, ge=0)  # 0: no curve

    # Latents.
    mutual_information: bool = True
    probe_documents: int = Field(64, ge=0)  # 0: no probe

    # Texts. All are measured; a page shows the first.
    num_samples: int = Field(200, ge=0)  # drawn from the prior
    num_reconstructions: int = Field(100, ge=0)
    num_interpolations: int = Field(2, ge=0)
    responses_per_source: int = Field(5, ge=0)  # conditional data: for `num_sources` of its sources
    num_sources: int = Field(100, ge=0)
    sample_max_tokens: int = Field(64, gt=0)
    sample_top_p: float = Field(0.95, gt=0, le=1)
    # How sacrebleu cuts texts into words: "13a", "none" where they are cut already, "intl", "zh",
    # "char".
    bleu_tokenizer: Literal["13a", "none", "intl", "zh", "char"] = "13a"

    # Folders of models on this machine; None leaves the figure out. Their content is part of the
    # evaluation's identity, their place is not.
    reference_model: Annotated[str | None, NotIdentity] = None  # a causal LM: perplexity of samples
    mauve_model: Annotated[str | None, NotIdentity] = None  # features for MAUVE
    bertscore_model: Annotated[str | None, NotIdentity] = None  # conditional data
    bertscore_layer: int | None = Field(None, gt=0)  # None: the model's last

    batch_tokens: Annotated[int, NotIdentity] = Field(8192, gt=0)
    num_workers: Annotated[int | None, NotIdentity] = Field(None, gt=0)  # None: what there is
    use_gpu: Annotated[bool | Literal["auto"], NotIdentity] = "auto"

    @model_validator(mode="after")
    def _curve_has_points(self) -> Self:
        if self.iw_curve_documents and not self.iw_curve:
            raise ValueError(
                "iw_curve is empty, but iw_curve_documents asks for a curve: give numbers of "
                "samples, as in iw_curve=[1,10,100], or iw_curve_documents=0"
            )
        if list(self.iw_curve) != sorted(set(self.iw_curve)):
            raise ValueError(
                f"iw_curve={list(self.iw_curve)} should rise from point to point, since it is a "
                "curve over the number of samples"
            )
        return self


class EvaluateSpec(Spec):
    """One run of the evaluate stage. Its inputs are weights and a dataset."""

    split: Literal["train", "valid", "test"] = "test"
    evaluate: EvaluationSpec = EvaluationSpec()
    cluster: Annotated[ClusterSpec, NotIdentity] = ClusterSpec()
