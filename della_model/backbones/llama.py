"""Llama and its kin (Mistral, Qwen2, Qwen3): rotary positions, grouped queries, a `v_proj`."""

from __future__ import annotations

from os import PathLike
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from della_model.routing import SelfAttention


class LlamaAdapter:
    """A causal language model of transformers that is built as Llama is.

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

    def self_attentions(self, backbone: PreTrainedModel) -> list[SelfAttention]:
        """Keys and values have fewer heads than queries."""
        return [
            SelfAttention(
                layer.self_attn,
                "v_proj",
                layer.self_attn.v_proj.out_features // layer.self_attn.head_dim,
                layer.self_attn.head_dim,
            )
            for layer in backbone.model.layers
        ]
