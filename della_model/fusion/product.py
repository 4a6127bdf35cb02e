"""The fusion as the paper prints it."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import initialization as init

from della_model.fusion.base import ValueFusion
from della_model.shapes import Float


class ProductFusion(ValueFusion):
    """ṽ = v + (W_v v) ∘ (W_z z): Eq. 9 of Hu et al. 2022, (Σ_r W_v^r v) ∘ (Σ_r W_z^r z).

    Summed before they are multiplied, the matrices of all ranks are one matrix: the rank adds
    parameters but no functions, so there is none here. Without `residual` the first v is left out,
    as in the paper.
    """

    def __init__(self, value_size: int, latent_size: int, rank: int, residual: bool = True) -> None:
        super().__init__(value_size, latent_size, rank, residual)
        self.value_factor = nn.Linear(value_size, value_size, bias=False)
        self.latent_factor = nn.Linear(latent_size, value_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Identity with `residual`; otherwise Var ṽ ≈ Var v where v and z have unit variance."""
        init.normal_(self.value_factor.weight, std=self.value_size**-0.5)
        if self.residual:
            init.zeros_(self.latent_factor.weight)
        else:
            init.normal_(self.latent_factor.weight, std=self.latent_size**-0.5)

    def forward(
        self,
        values: Float[Tensor, "batch time value"],
        latent: Float[Tensor, "batch latent"],
    ) -> Float[Tensor, "batch time value"]:
        """The fused values ṽ, in the dtype of `values`."""
        from_latent = self.latent_factor(latent.to(values.dtype)).unsqueeze(1)  # [B, 1, d]
        fused = self.value_factor(values) * from_latent
        return values + fused if self.residual else fused
