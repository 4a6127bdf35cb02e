"""What a family of decoders has to offer, and the bidirectional pass over its trunk."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from della_model.routing import SelfAttention
from della_model.shapes import Bool, Float, Int


class BackboneAdapter(Protocol):
    """The few things that differ between families. Adapters hold no state."""

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A language model of the family with random weights."""
        ...

    def load(self, folder_or_hub_id: str | PathLike[str], **kwargs: Any) -> PreTrainedModel:
        """A pretrained language model of the family."""
        ...

    def trunk(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """The part that gives hidden states; the rest is the `lm_head`."""
        ...

    def self_attentions(self, backbone: PreTrainedModel) -> list[SelfAttention]:
        """The self-attention of each decoder layer: where latents can enter."""
        ...


def encode(
    trunk: PreTrainedModel,
    input_ids: Int[Tensor, "batch time"],
    unpadded: Bool[Tensor, "batch time"],
    position_ids: Int[Tensor, "batch time"],
    layers: Sequence[int],
) -> list[Float[Tensor, "batch time hidden"]]:
    """Hidden states after each of `layers`, every position seeing every unpadded one; no latents.

    After the trunk's last layer these are, by transformers' convention, behind its final norm.
    """
    output = trunk(
        input_ids=input_ids,
        attention_mask=bidirectional_mask(unpadded, trunk),
        position_ids=position_ids,
        use_cache=False,
        output_hidden_states=True,
    )
    return [output.hidden_states[layer + 1] for layer in layers]


def bidirectional_mask(unpadded: Bool[Tensor, "batch time"], trunk: PreTrainedModel) -> Tensor:
    """[B, 1, T, T]: a mask of four dimensions is used as it is, so nothing makes it causal."""
    # A document of padding alone (a filler) sees itself: a softmax over nothing is NaN.
    visible = unpadded | ~unpadded.any(-1, keepdim=True)
    time = unpadded.shape[-1]
    mask = visible[:, None, None, :].expand(-1, 1, time, time)
    if trunk.config._attn_implementation == "sdpa":
        return mask
    additive = torch.zeros(mask.shape, dtype=trunk.dtype, device=mask.device)
    return additive.masked_fill(~mask, torch.finfo(trunk.dtype).min)
