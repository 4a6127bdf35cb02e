"""Llama and its kin (Mistral, Qwen2, Qwen3): rotary positions, grouped queries, a `v_proj`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from della_model.backbones.base import FusedProjection, route_latent
from della_model.fusion import Fusion


class LlamaAdapter:
    """Fusions over a causal language model of transformers that is built as Llama is.

    Values have a projection of their own, as wide as the key-value heads together: with grouped
    queries that is narrower than the hidden states.
    """

    def __init__(self, model_class: type[PreTrainedModel]) -> None:
        self._model_class = model_class

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A model of the family with random weights."""
        return self._model_class._from_config(config)

    def load(self, folder_or_hub_id: str | PathLike[str], **kwargs: Any) -> PreTrainedModel:
        """A pretrained model of the family."""
        return self._model_class.from_pretrained(folder_or_hub_id, **kwargs)

    def trunk(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """The model without its head."""
        return backbone.model

    def value_size(self, config: PreTrainedConfig) -> int:
        """Key-value heads times the width of one."""
        head_dim = getattr(config, "head_dim", None)
        width: int = head_dim or config.hidden_size // config.num_attention_heads
        return config.num_key_value_heads * width

    def install_fusions(
        self, backbone: PreTrainedModel, fusions: Sequence[tuple[int, Fusion]]
    ) -> None:
        """Wraps `v_proj` where there is a fusion, and routes `latents` in every layer."""
        slots = {layer: (slot, fusion) for slot, (layer, fusion) in enumerate(fusions)}
        for layer, block in enumerate(backbone.model.layers):
            attention = block.self_attn
            slot, projection = 0, None
            if layer in slots:
                slot, fusion = slots[layer]
                projection = FusedProjection(
                    attention.v_proj, fusion, attention.v_proj.out_features
                )
                attention.v_proj = projection
            route_latent(attention, projection, slot)
