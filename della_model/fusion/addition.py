"""Fusions that add a linear map of latents; all start as the identity."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import initialization as init

from della_model.fusion.base import Fusion, ValueFusion
from della_model.shapes import Float


class ValueShift(ValueFusion):
    """ṽ = v + W z: the paper's ablation without the tensor product."""

    def __init__(self, value_size: int, latent_size: int, rank: int, residual: bool = True) -> None:
        super().__init__(value_size, latent_size, rank, residual)
        self.latent_to_value = nn.Linear(latent_size, value_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts as the identity."""
        init.zeros_(self.latent_to_value.weight)

    def forward(
        self,
        values: Float[Tensor, "batch time value"],
        latent: Float[Tensor, "batch latent"],
    ) -> Float[Tensor, "batch time value"]:
        """The shifted values ṽ, in the dtype of `values`."""
        return values + self.latent_to_value(latent.to(values.dtype)).unsqueeze(1)


class Shift(Fusion):
    """e + W [z_1; …; z_L], outside the layers: the baselines Embed and Softmax, there with L = 1.

    Added to every input embedding (Embed), or to every hidden state before the vocabulary head
    (Softmax).
    """

    def __init__(self, num_latents: int, latent_size: int, hidden_size: int) -> None:
        super().__init__()
        self.latents_to_hidden = nn.Linear(num_latents * latent_size, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts as the identity."""
        init.zeros_(self.latents_to_hidden.weight)

    def forward(
        self,
        states: Float[Tensor, "batch time hidden"],
        latents: Float[Tensor, "batch layers latent"],
    ) -> Float[Tensor, "batch time hidden"]:
        """The shifted embeddings or hidden states, in their dtype."""
        shift = self.latents_to_hidden(latents.flatten(1).to(states.dtype))
        return states + shift.unsqueeze(1)
