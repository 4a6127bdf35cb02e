"""BART: an encoder of its own, and a decoder that looks at sources through cross-attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding

from della_model.backbones.base import BackboneAdapter
from della_model.routing import SelfAttention


class BartAdapter(BackboneAdapter):
    """transformers' own `BartForConditionalGeneration`."""

    is_encoder_decoder = True

    def prepare(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """Makes both stacks take `position_ids`, so that left padding does not shift positions.

        BART's own are counted from a row's first column.
        """
        for stack in (backbone.model.encoder, backbone.model.decoder):
            stack.embed_positions.__class__ = PlacedPositions
            stack.register_forward_pre_hook(_lay_in_positions, with_kwargs=True)
            stack.register_forward_hook(_take_out_positions, always_call=True)
        return backbone

    def trunk(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """The `BartDecoder` inside."""
        return backbone.model.decoder

    def encoder(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """The `BartEncoder` inside."""
        return backbone.model.encoder

    def self_attentions(self, backbone: PreTrainedModel) -> list[SelfAttention]:
        """The decoder's; every head has keys and values of its own."""
        attentions = [layer.self_attn for layer in backbone.model.decoder.layers]
        return [SelfAttention(a, "v_proj", a.num_heads, a.head_dim) for a in attentions]

    def cross_attentions(self, backbone: PreTrainedModel) -> list[nn.Module]:
        """The attentions to a source, each with its norm."""
        layers = backbone.model.decoder.layers
        return [m for layer in layers for m in (layer.encoder_attn, layer.encoder_attn_layer_norm)]

    def num_layers(self, config: PreTrainedConfig) -> int:
        """Layers of the decoder."""
        count: int = config.decoder_layers
        return count

    def num_encoder_layers(self, config: PreTrainedConfig) -> int:
        """Layers of the encoder."""
        count: int = config.encoder_layers
        return count

    def logits_bias(self, backbone: PreTrainedModel) -> Tensor | None:
        """`final_logits_bias`, a buffer."""
        bias: Tensor = backbone.final_logits_bias[0]
        return bias


class PlacedPositions(BartLearnedPositionalEmbedding):
    """BART's positions, at the places that were laid in for one call."""

    placed: Tensor | None = None

    def forward(self, input_ids: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Embeddings [B, T, H] of the places laid in; without any, BART's own."""
        if self.placed is None:
            return super().forward(input_ids, *args, **kwargs)
        return nn.Embedding.forward(self, self.placed + self.offset)


def _lay_in_positions(
    stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs = dict(kwargs)
    stack.embed_positions.placed = kwargs.pop("position_ids", None)
    return args, kwargs


def _take_out_positions(stack: Any, *hook_arguments: Any) -> None:  # noqa: ARG001
    stack.embed_positions.placed = None
