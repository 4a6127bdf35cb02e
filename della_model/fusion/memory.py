"""The baseline Memory: a layer's latent as one more key and value of its attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers import initialization as init
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from della_model.fusion.base import Fusion
from della_model.shapes import Float

# The scale at which GPT-2 starts its matrices.
_INITIAL_STD = 0.02
ATTENTION_WITH_MEMORY = "latent_memory"


class KeyAndValue(NamedTuple):
    """One more position for every query of a document to attend to."""

    key: Float[Tensor, "batch heads 1 head"]
    value: Float[Tensor, "batch heads 1 head"]


class LatentMemory(Fusion):
    """k = W_k z + b_k, v = W_v z + b_v: seen by every position, and itself without one.

    Not the identity at the start: whatever its value, another key takes a share of the attention.
    """

    def __init__(self, num_heads: int, head_size: int, latent_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.key = nn.Linear(latent_size, num_heads * head_size)
        self.value = nn.Linear(latent_size, num_heads * head_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small keys and values: an average share, and little to give."""
        for linear in (self.key, self.value):
            init.normal_(linear.weight, std=_INITIAL_STD)
            init.zeros_(linear.bias)

    def forward(self, latent: Float[Tensor, "batch latent"]) -> KeyAndValue:
        """The key and value of each document, by head."""
        latent = latent.to(self.key.weight.dtype)

        def by_head(flat: Tensor) -> Tensor:
            return flat.unflatten(-1, (self.num_heads, -1)).unsqueeze(2)

        return KeyAndValue(by_head(self.key(latent)), by_head(self.value(latent)))


def attention_with_memory(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    memory: KeyAndValue | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' scaled-dot-product attention, with `memory` before the keys and values.

    `key` and `value` come from the cache, where there is one; `memory` never enters it, so cached
    and uncached attention see it once. Without `memory` this is the attention itself.
    """
    if memory is not None:
        attention_mask = _mask_with_memory(attention_mask, query.shape[2], key.shape[2], key.device)
        key = torch.cat([memory.key.to(key.dtype), key], dim=2)
        value = torch.cat([memory.value.to(value.dtype), value], dim=2)
        if position_bias is not None:
            position_bias = F.pad(position_bias, (1, 0))
    kwargs |= {} if position_bias is None else {"position_bias": position_bias}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _mask_with_memory(
    mask: Tensor | None, num_queries: int, num_keys: int, device: torch.device
) -> Tensor | None:
    """The mask with a first column that all may see."""
    if mask is None:
        if num_queries == 1:
            return None
        # Left out by transformers where plain causality says it all.
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
        mask = mask.tril(num_keys - num_queries)[None, None]
    return F.pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)


AttentionInterface.register(ATTENTION_WITH_MEMORY, attention_with_memory)
