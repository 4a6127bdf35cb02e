"""Llama and its kin (Mistral, Qwen2, Qwen3): rotary positions, grouped queries, a `v_proj`."""

from __future__ import annotations

from transformers import PreTrainedModel

from della_model.backbones.base import BackboneAdapter
from della_model.routing import SelfAttention


class LlamaAdapter(BackboneAdapter):
    """A causal language model of transformers that is built as Llama is.

    Values have a projection of their own, as wide as the key-value heads together: with grouped
    queries that is narrower than the hidden states.
    """

    def trunk(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """The model without its head."""
        return backbone.model

    def self_attentions(self, backbone: PreTrainedModel) -> list[SelfAttention]:
        """Several query heads share the keys and values of one head."""
        attentions = [layer.self_attn for layer in backbone.model.layers]
        return [
            SelfAttention(a, "v_proj", a.v_proj.out_features // a.head_dim, a.head_dim)
            for a in attentions
        ]
