"""The low-rank tensor product of attention values and a latent: DELLA's own fusion."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from della_model.fusion.base import ValueFusion
from della_model.shapes import Float


class AffineMap(NamedTuple):
    """v → M v + b of each document: what a fusion is once the latent is given."""

    matrix: Float[Tensor, "documents value value"]
    offset: Float[Tensor, "documents value"]


class LowRankTensorFusion(ValueFusion):
    """ṽ = v + Σ_r (W_v^r [v; 1]) ∘ (W_z^r [z; 1]): the product first, then the sum over ranks.

    A tensor of order three over [v; 1] and [z; 1], of rank R (Liu et al. 2018, after which Hu et
    al. 2022 name theirs). `residual` keeps v: with the latent factors W_z at zero the fusion starts
    as the identity, so a pretrained decoder starts as itself. Only one factor of the product is
    zero, so the gradient reaches W_z at once and all else from the second step on. Without
    `residual` the values are replaced, as in the paper, and start as a random map of like variance.
    """

    def __init__(self, value_size: int, latent_size: int, rank: int, residual: bool = True) -> None:
        super().__init__(value_size, latent_size, rank, residual)
        # All ranks in one matrix each: rank r owns the columns r·d … (r+1)·d of the output.
        self.value_factor = nn.Linear(value_size, rank * value_size)
        self.latent_factor = nn.Linear(latent_size, rank * value_size)
        self.folded: AffineMap | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Identity with `residual`; otherwise Var ṽ ≈ Var v where v and z have unit variance."""
        init.normal_(self.value_factor.weight, std=self.value_size**-0.5)
        init.zeros_(self.value_factor.bias)
        if self.residual:
            init.zeros_(self.latent_factor.weight)
            init.zeros_(self.latent_factor.bias)
        else:
            std = (self.rank * (self.latent_size + 1)) ** -0.5
            init.normal_(self.latent_factor.weight, std=std)
            init.normal_(self.latent_factor.bias, std=std)

    def forward(
        self,
        values: Float[Tensor, "batch time value"],
        latent: Float[Tensor, "batch latent"],
    ) -> Float[Tensor, "batch time value"]:
        """The fused values ṽ, in the dtype of `values`.

        While `folded` is laid in, it stands for `latent`; rows of a document follow each other.
        """
        if self.folded is not None:
            matrix, offset = self.folded
            by_document = values.reshape(len(matrix), -1, self.value_size)
            return torch.baddbmm(offset.unsqueeze(1), by_document, matrix.mT).view_as(values)
        latent = latent.to(values.dtype)
        ranks = (self.rank, values.shape[-1])
        from_values = self.value_factor(values).unflatten(-1, ranks)  # [B, T, R, d]
        from_latent = self.latent_factor(latent).unflatten(-1, ranks).unsqueeze(1)  # [B, 1, R, d]
        fused = (from_values * from_latent).sum(dim=-2)
        return values + fused if self.residual else fused

    def fold(self, latent: Float[Tensor, "documents latent"]) -> AffineMap:
        """The map of the values under given latents: Σ_r diag(W_z^r [z; 1]) W_v^r, and I.

        A step of generation then reads one matrix a document, and not one a rank.
        """
        weight, bias = self.value_factor.weight, self.value_factor.bias
        shape = (self.rank, self.value_size)
        from_latent = self.latent_factor(latent.to(weight.dtype)).unflatten(-1, shape)  # [B, R, d]
        matrix = torch.einsum("brd,rde->bde", from_latent, weight.unflatten(0, shape))
        offset = torch.einsum("brd,rd->bd", from_latent, bias.unflatten(0, shape))
        if self.residual:
            matrix = matrix + torch.eye(self.value_size, dtype=matrix.dtype, device=matrix.device)
        return AffineMap(matrix, offset)
