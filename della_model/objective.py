"""What training minimises."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from della_model.condition import Condition
from della_model.errors import ConfigError
from della_model.model import Della
from della_model.outputs import ElboTerms
from della_model.shapes import Bool, Float, Int


class Objective(nn.Module):
    """loss = Σ_documents weight · (reconstruction_nll + β Σ_l max(KL_l, free_bits)).

    Encoder, chain, decoder and KL in one forward that returns one scalar: the module to hand to
    DDP, FSDP or DeepSpeed, whose hooks expect just that.

    With weight = 1 / (documents of the global batch), the sum of the losses over ranks and
    accumulation steps is the mean over the global batch, however it was divided. Where gradients
    are averaged over ranks or steps, the caller scales the weights by their number. Weight 0 marks
    a filler, which counts nowhere.

    Args:
        model: the Della to train.
        free_bits: nats of KL that each layer of each document has for nothing; below them KL_l
            has no gradient. The reported KL is always the true one.
    """

    def __init__(self, model: Della, free_bits: float = 0.0) -> None:
        super().__init__()
        if not (math.isfinite(free_bits) and free_bits >= 0):
            raise ConfigError(
                f"free_bits: expected nats a layer ≥ 0, got {free_bits}: the KL is never negative; "
                "give 0 to switch them off."
            )
        self.model = model
        self.free_bits = free_bits

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
        noise: Float[Tensor, "batch layers latent"],
        document_weight: Float[Tensor, " batch"],
        beta: float,
        condition_ids: Int[Tensor, "batch source"] | None = None,
        condition_mask: Int[Tensor, "batch source"] | Bool[Tensor, "batch source"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss, and detached sums over the documents of weight > 0 (nats, counts)."""
        condition = None
        if condition_ids is not None and condition_mask is not None:
            condition = Condition(condition_ids, condition_mask)
        terms = self.model.elbo_terms(input_ids, attention_mask, noise, condition)
        charged_kl = terms.kl_per_layer.clamp(min=self.free_bits).sum(-1)
        loss = (document_weight * (terms.reconstruction_nll + beta * charged_kl)).sum()
        return loss, {"loss": loss.detach(), **_sums(terms, document_weight > 0)}


@torch.no_grad()
def _sums(terms: ElboTerms, counted: Bool[Tensor, " batch"]) -> dict[str, Tensor]:
    kl_per_layer = (terms.kl_per_layer * counted.unsqueeze(-1)).sum(0)
    return {
        "reconstruction_nll": (terms.reconstruction_nll * counted).sum(),
        "kl": kl_per_layer.sum(),
        "kl_per_layer": kl_per_layer,
        "num_documents": counted.sum(),
        "num_tokens": (terms.num_predicted * counted).sum(),
    }
