"""GPT-2: queries, keys and values are the three thirds of one projection, `c_attn`."""

from __future__ import annotations

from os import PathLike
from typing import Any

from transformers import GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel

from della_model.routing import SelfAttention


class GPT2Adapter:
    """transformers' own `GPT2LMHeadModel`."""

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A GPT-2 with random weights."""
        return GPT2LMHeadModel._from_config(config)

    def load(self, folder_or_hub_id: str | PathLike[str], **kwargs: Any) -> PreTrainedModel:
        """A pretrained GPT-2."""
        return GPT2LMHeadModel.from_pretrained(folder_or_hub_id, **kwargs)

    def trunk(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """The `GPT2Model` inside."""
        return backbone.transformer

    def self_attentions(self, backbone: PreTrainedModel) -> list[SelfAttention]:
        """Every head has keys and values of its own."""
        return [
            SelfAttention(block.attn, "c_attn", block.attn.num_heads, block.attn.head_dim)
            for block in backbone.transformer.h
        ]
