"""How far the latent of one layer reaches: swap it between two documents, see the output change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from della_model.condition import Condition, Reading
from della_model.model import Della, predicted_tokens
from della_model.shapes import Bool, Float, Int


@dataclass(frozen=True)
class SwapEffect:
    """What a document's output loses when one layer's latent is another document's.

    Row l swaps the latent of layer l alone; the last row swaps those of all layers.
    """

    token_kl: Float[Tensor, "rows batch"]  # KL(p(·|x_<t, z) ‖ p(·|x_<t, z′)), mean over t, nats
    logit_change: Float[Tensor, "rows batch"]  # root mean square over t and the vocabulary
    nll_increase: Float[Tensor, "rows batch"]  # of −log p(x | z), in nats a document


@torch.no_grad()
def swap_effect(
    model: Della,
    input_ids: Int[Tensor, "batch time"],
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
    latents: Float[Tensor, "batch layers latent"],
    partners: Float[Tensor, "batch layers latent"],
    condition: Condition | Reading | None = None,
) -> SwapEffect:
    """The effect on each document of taking layer l's latent from its partner, l by l.

    Under teacher forcing, on predicted tokens. Logits are compared after their mean over the
    vocabulary is taken away, for a shift of all of them changes nothing.
    """
    predicted = predicted_tokens(attention_mask.bool())[:, 1:]
    targets = input_ids[:, 1:, None]
    reading = None if condition is None else model.read(condition)
    own = _log_probabilities(model, input_ids, attention_mask, latents, reading)
    rows = []
    for layers in _swaps(latents.shape[1]):
        swapped = latents.clone()
        swapped[:, layers] = partners[:, layers]
        other = _log_probabilities(model, input_ids, attention_mask, swapped, reading)
        kl = (own.exp() * (own - other)).sum(-1)
        # Log-probabilities are logits with a shift of their own; the mean takes it away.
        change = own - other
        change = (change - change.mean(-1, keepdim=True)).square().mean(-1)
        loss = (own - other).gather(-1, targets).squeeze(-1)
        count = predicted.sum(-1)
        rows.append(
            (
                (kl * predicted).sum(-1) / count,
                ((change * predicted).sum(-1) / count).sqrt(),
                (loss * predicted).sum(-1),
            )
        )
    return SwapEffect(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _swaps(num_layers: int) -> list[list[int]]:
    """Each layer alone, then all together."""
    return [*([layer] for layer in range(num_layers)), list(range(num_layers))]


def _log_probabilities(
    model: Della,
    input_ids: Tensor,
    attention_mask: Tensor,
    latents: Tensor,
    reading: Reading | None,
) -> Float[Tensor, "batch before vocabulary"]:
    """log p(· | x_<t, z) at each position but the last, in float64."""
    logits = model(input_ids, attention_mask, latents=latents, condition=reading).logits
    return logits[:, :-1].double().log_softmax(-1)
