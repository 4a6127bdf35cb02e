"""GPT-2: queries, keys and values are the three thirds of one projection, `c_attn`."""

from __future__ import annotations

from transformers import PreTrainedModel

from della_model.backbones.base import BackboneAdapter
from della_model.routing import SelfAttention


class GPT2Adapter(BackboneAdapter):
    """transformers' own `GPT2LMHeadModel`."""

    def trunk(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """The `GPT2Model` inside."""
        return backbone.transformer

    def self_attentions(self, backbone: PreTrainedModel) -> list[SelfAttention]:
        """Every head has keys and values of its own."""
        return [
            SelfAttention(block.attn, "c_attn", block.attn.num_heads, block.attn.head_dim)
            for block in backbone.transformer.h
        ]
