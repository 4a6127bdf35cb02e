"""One vector a document from the hidden states of its unpadded positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from della_model.gaussian import at_least_float32
from della_model.shapes import Bool, Float

POOLINGS = ("attention", "first_token", "mean")


class Pooling(nn.Module):
    """Normalises each position, then averages the unpadded ones with weights that sum to one.

    The LayerNorm comes first because a pretrained decoder's first position has a norm hundreds of
    times the others' and would be the whole average.

    - attention: weights from a learnt score, softmax over the unpadded positions; it starts at
      zero, hence as the mean.
    - mean: equal weights.
    - first_token: all weight on the first unpadded position.
    """

    def __init__(self, hidden_size: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(hidden_size)
        # No bias: a softmax does not see it.
        self.score = nn.Linear(hidden_size, 1, bias=False) if kind == "attention" else None

    def reset_parameters(self) -> None:
        """Attention starts as the mean."""
        if self.score is not None:
            init.zeros_(self.score.weight)

    def forward(
        self,
        hidden: Float[Tensor, "batch time hidden"],
        unpadded: Bool[Tensor, "batch time"],
    ) -> Float[Tensor, "batch hidden"]:
        """The pooled features x_l, in the dtype of `hidden`."""
        normed = self.norm(hidden)
        weights = self._weights(normed, unpadded).to(normed.dtype)
        return torch.einsum("bt,bth->bh", weights, normed)

    def _weights(
        self,
        normed: Float[Tensor, "batch time hidden"],
        unpadded: Bool[Tensor, "batch time"],
    ) -> Float[Tensor, "batch time"]:
        if self.kind == "first_token":
            return F.one_hot(unpadded.int().argmax(-1), unpadded.shape[-1]).float()
        if self.score is None:
            counts = unpadded.sum(-1, keepdim=True).clamp(min=1)
            return unpadded.float() / counts
        scores = at_least_float32(self.score(normed).squeeze(-1))
        # The lowest finite number, not −inf: a document of padding alone must not make NaNs.
        return scores.masked_fill(~unpadded, torch.finfo(scores.dtype).min).softmax(-1)
