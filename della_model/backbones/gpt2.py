"""GPT-2: queries, keys and values are the three thirds of one projection, `c_attn`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from transformers import GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel

from della_model.backbones.base import FusedProjection, route_latent
from della_model.fusion import Fusion


class GPT2Adapter:
    """Fusions over transformers' own `GPT2LMHeadModel`."""

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A GPT-2 with random weights."""
        return GPT2LMHeadModel._from_config(config)

    def load(self, folder_or_hub_id: str | PathLike[str], **kwargs: Any) -> PreTrainedModel:
        """A pretrained GPT-2."""
        return GPT2LMHeadModel.from_pretrained(folder_or_hub_id, **kwargs)

    def trunk(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """The `GPT2Model` inside."""
        return backbone.transformer

    def value_size(self, config: PreTrainedConfig) -> int:
        """Every head has its own values, together as wide as the hidden states."""
        return config.n_embd

    def install_fusions(
        self, backbone: PreTrainedModel, fusions: Sequence[tuple[int, Fusion]]
    ) -> None:
        """Wraps `c_attn` where there is a fusion, and routes `latents` in every layer."""
        slots = {layer: (slot, fusion) for slot, (layer, fusion) in enumerate(fusions)}
        for layer, block in enumerate(backbone.transformer.h):
            slot, projection = 0, None
            if layer in slots:
                slot, fusion = slots[layer]
                projection = FusedProjection(block.attn.c_attn, fusion, block.attn.split_size)
                block.attn.c_attn = projection
            route_latent(block.attn, projection, slot)
