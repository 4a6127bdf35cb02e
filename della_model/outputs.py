"""What the model returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from della_model.gaussian import DiagonalGaussian
from della_model.latents import LatentSample
from della_model.shapes import Float, Int


@dataclass(frozen=True)
class ElboTerms:
    """The terms of each document's ELBO, in nats; tokens and layers summed, never averaged."""

    reconstruction_nll: Float[Tensor, " batch"]
    kl_per_layer: Float[Tensor, "batch layers"]
    num_predicted: Int[Tensor, " batch"]
    sample: LatentSample

    @property
    def kl(self) -> Float[Tensor, " batch"]:
        """Σ_l KL(q_l ‖ p_l)."""
        return self.kl_per_layer.sum(-1)

    @property
    def negative_elbo(self) -> Float[Tensor, " batch"]:
        """−log p(x | z) + Σ_l KL(q_l ‖ p_l): in expectation an upper bound of −log p(x)."""
        return self.reconstruction_nll + self.kl


@dataclass
class DellaOutput(ModelOutput):
    """Logits of the decoder; and, where the latents were inferred, the terms of the ELBO.

    Attributes:
        logits: [B, T, V], of the positions asked for.
        past_key_values: the key-value cache, where one was asked for.
        latents: [B, L, p], inferred or as given.
        reconstruction_nll: [B], −log p(x | z) in nats.
        kl_per_layer: [B, L], in nats.
        num_predicted: [B], tokens that are predicted.
        posteriors, priors: a DiagonalGaussian a layer.
    """

    logits: Tensor | None = None
    past_key_values: Any = None
    latents: Tensor | None = None
    reconstruction_nll: Tensor | None = None
    kl_per_layer: Tensor | None = None
    num_predicted: Tensor | None = None
    posteriors: list[DiagonalGaussian] | None = None
    priors: list[DiagonalGaussian] | None = None
