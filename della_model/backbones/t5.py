"""T5: an encoder of its own, relative positions, heads that may be wider than the hidden states."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from della_model.backbones.base import BackboneAdapter
from della_model.routing import SelfAttention


class T5Adapter(BackboneAdapter):
    """transformers' own `T5ForConditionalGeneration`."""

    is_encoder_decoder = True

    def prepare(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """Lets both stacks pass over `position_ids`: their positions are relative."""
        for stack in (backbone.encoder, backbone.decoder):
            stack.register_forward_pre_hook(_drop_positions, with_kwargs=True)
        return backbone

    def trunk(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """The decoder's `T5Stack`."""
        return backbone.decoder

    def encoder(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """The encoder's `T5Stack`."""
        return backbone.encoder

    def self_attentions(self, backbone: PreTrainedModel) -> list[SelfAttention]:
        """The decoder's; every head has keys and values of its own."""
        attentions = [block.layer[0].SelfAttention for block in backbone.decoder.block]
        return [SelfAttention(a, "v", a.n_heads, a.key_value_proj_dim) for a in attentions]

    def cross_attentions(self, backbone: PreTrainedModel) -> list[nn.Module]:
        """The attentions to a source, each with its norm."""
        return [block.layer[1] for block in backbone.decoder.block]

    def num_layers(self, config: PreTrainedConfig) -> int:
        """Layers of the decoder."""
        count: int = config.num_decoder_layers
        return count

    def num_encoder_layers(self, config: PreTrainedConfig) -> int:
        """Layers of the encoder."""
        count: int = config.num_layers
        return count

    def context(self, config: PreTrainedConfig) -> int:
        """Relative positions have no end; the published models were trained on this many."""
        return getattr(config, "n_positions", None) or 512

    def start_id(self, config: PreTrainedConfig) -> int | None:
        """T5 has no BOS: its decoder begins with the id of padding."""
        start: int | None = getattr(config, "decoder_start_token_id", None)
        return config.pad_token_id if start is None else start

    def before_head(self, backbone: PreTrainedModel, hidden: Tensor) -> Tensor:
        """The first T5 scales hidden states, because its head shares the embeddings' weights."""
        config = backbone.config
        return hidden * config.d_model**-0.5 if config.scale_decoder_outputs else hidden


def _drop_positions(
    stack: nn.Module,  # noqa: ARG001
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name != "position_ids"}
