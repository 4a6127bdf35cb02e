"""What a family of backbones has to offer, and the bidirectional pass over its encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from della_model.routing import SelfAttention
from della_model.shapes import Bool, Float, Int


class BackboneAdapter(ABC):
    """The few things that differ between families. Adapters hold no state of a model.

    What is not abstract is right for a decoder without an encoder of its own, whose blocks make
    both passes.

    Args:
        model_class: the family's language model in transformers.
    """

    is_encoder_decoder = False

    def __init__(self, model_class: type[PreTrainedModel]) -> None:
        self.model_class = model_class

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A language model of the family with random weights."""
        return self.prepare(self.model_class._from_config(config))

    def load(self, folder_or_hub_id: str | PathLike[str], **kwargs: Any) -> PreTrainedModel:
        """A pretrained language model of the family."""
        return self.prepare(self.model_class.from_pretrained(folder_or_hub_id, **kwargs))

    def prepare(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """Changes what a new language model lacks for the two passes; nothing as a rule."""
        return backbone

    @abstractmethod
    def trunk(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """The decoder that gives hidden states; the rest is the `lm_head`."""

    @abstractmethod
    def self_attentions(self, backbone: PreTrainedModel) -> list[SelfAttention]:
        """The self-attention of each decoder layer: where latents can enter."""

    def encoder(self, backbone: PreTrainedModel) -> PreTrainedModel:
        """What makes the bidirectional pass."""
        return self.trunk(backbone)

    def cross_attentions(self, backbone: PreTrainedModel) -> list[nn.Module]:  # noqa: ARG002
        """The decoder's modules that do nothing where there is no source."""
        return []

    def num_layers(self, config: PreTrainedConfig) -> int:
        """Layers of the decoder."""
        count: int = config.num_hidden_layers
        return count

    def num_encoder_layers(self, config: PreTrainedConfig) -> int:
        """Layers of the encoder."""
        return self.num_layers(config)

    def encoder_layer(self, config: PreTrainedConfig, layer: int) -> int:
        """The encoder's layer that stands as far up as a layer of the decoder."""
        return -(-(layer + 1) * self.num_encoder_layers(config) // self.num_layers(config)) - 1

    def context(self, config: PreTrainedConfig) -> int:
        """The longest sequence that either pass takes, in tokens."""
        positions: int = config.max_position_embeddings
        return positions

    def start_id(self, config: PreTrainedConfig) -> int | None:  # noqa: ARG002
        """The id that the decoder reads in the place of a document's BOS; None for BOS itself."""
        return None

    def before_head(self, backbone: PreTrainedModel, hidden: Tensor) -> Tensor:  # noqa: ARG002
        """The decoder's hidden states as the `lm_head` wants them."""
        return hidden

    def logits_bias(self, backbone: PreTrainedModel) -> Tensor | None:  # noqa: ARG002
        """A constant [V] that the family adds to its logits."""
        return None


class Encoded(NamedTuple):
    """Hidden states of the bidirectional pass."""

    of_layers: list[Float[Tensor, "batch time hidden"]]  # after each of the layers asked for
    last: Float[Tensor, "batch time hidden"]  # after the last layer and the final norm


def encode(
    encoder: PreTrainedModel,
    input_ids: Int[Tensor, "batch time"],
    unpadded: Bool[Tensor, "batch time"],
    position_ids: Int[Tensor, "batch time"],
    layers: Sequence[int],
) -> Encoded:
    """The pass in which every position sees every unpadded one; no latents.

    After the encoder's last layer hidden states are, by transformers' convention, behind its final
    norm.
    """
    if "flash" in str(encoder.config._attn_implementation):
        # Its kernels take no mask of four dimensions, but a word about causality.
        attention: dict[str, Any] = {"attention_mask": _visible(unpadded).long()}
        attention["is_causal"] = False
    else:
        attention = {"attention_mask": bidirectional_mask(unpadded, encoder)}
    output = encoder(
        input_ids=input_ids,
        position_ids=position_ids,
        use_cache=False,
        output_hidden_states=True,
        **attention,
    )
    return Encoded([output.hidden_states[layer + 1] for layer in layers], output.last_hidden_state)


def bidirectional_mask(unpadded: Bool[Tensor, "batch time"], encoder: PreTrainedModel) -> Tensor:
    """[B, 1, T, T]: a mask of four dimensions is used as it is, so nothing makes it causal."""
    visible = _visible(unpadded)
    time = unpadded.shape[-1]
    mask = visible[:, None, None, :].expand(-1, 1, time, time)
    if encoder.config._attn_implementation == "sdpa":
        return mask
    additive = torch.zeros(mask.shape, dtype=encoder.dtype, device=mask.device)
    return additive.masked_fill(~mask, torch.finfo(encoder.dtype).min)


def _visible(unpadded: Bool[Tensor, "batch time"]) -> Bool[Tensor, "batch time"]:
    """A document of padding alone (a filler) sees itself: a softmax over nothing is NaN."""
    return unpadded | ~unpadded.any(-1, keepdim=True)
