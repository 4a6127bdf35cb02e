"""What every fusion offers."""

from __future__ import annotations

from torch import Tensor, nn

from della_model.shapes import Float


class Fusion(nn.Module):
    """A module through which latents enter the decoder."""

    def reset_parameters(self) -> None:
        """Draws the starting weights, by transformers' initialisers, which keep loaded ones."""
        raise NotImplementedError


class ValueFusion(Fusion):
    """Changes the attention values of one layer under that layer's latent.

    Args:
        value_size: width of the values, all heads together.
        latent_size: p.
        rank: R, for those that have one.
        residual: True adds to the values, False replaces them, for those that can.
    """

    def __init__(self, value_size: int, latent_size: int, rank: int, residual: bool) -> None:
        super().__init__()
        self.value_size = value_size
        self.latent_size = latent_size
        self.rank = rank
        self.residual = residual

    def forward(
        self,
        values: Float[Tensor, "batch time value"],
        latent: Float[Tensor, "batch latent"],
    ) -> Float[Tensor, "batch time value"]:
        """The values under the latent."""
        raise NotImplementedError
