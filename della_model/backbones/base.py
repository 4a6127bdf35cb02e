"""What a family of decoders has to offer, and how a layer's latent reaches its values.

A latent travels as an argument and never as a setting: `latents` [B, L, p] is handed to the trunk,
which passes its keyword arguments to every block and attention (transformers' convention). There a
hook takes it out and lays the layer's own slice into the wrapped projection for that one call. So a
block that is run again, as activation checkpointing does, sees the latents of its own batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os import PathLike
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from della_model.fusion import Fusion
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

    def value_size(self, config: PreTrainedConfig) -> int:
        """Width of the attention values of one layer, all heads together."""
        ...

    def install_fusions(
        self, backbone: PreTrainedModel, fusions: Sequence[tuple[int, Fusion]]
    ) -> None:
        """Puts each (decoder layer, fusion) in its place; slot l of `latents` feeds the l-th."""
        ...


class FusedProjection(nn.Module):
    """A projection whose last `value_size` outputs are attention values, fused with a latent.

    The latent is laid in by `route_latent` for one call. Without it, as in the encoder's pass, the
    outputs are the projection's own. Values are changed before the key-value cache sees them, so
    cached values stay fused and no step of generation does the work again.
    """

    def __init__(self, projection: nn.Module, fusion: Fusion, value_size: int) -> None:
        super().__init__()
        self.projection = projection
        self.fusion = fusion
        self.value_size = value_size
        self.latent: Tensor | None = None

    def forward(
        self, hidden: Float[Tensor, "batch time hidden"]
    ) -> Float[Tensor, "batch time out"]:
        """The projection's outputs, the values among them fused."""
        outputs = self.projection(hidden)
        if self.latent is None:
            return outputs
        others = outputs.shape[-1] - self.value_size
        kept, values = outputs.split([others, self.value_size], dim=-1)
        return torch.cat([kept, self.fusion(values, self.latent)], dim=-1)


def route_latent(attention: nn.Module, projection: FusedProjection | None, slot: int) -> None:
    """Makes `attention` take `latents` from its arguments and use slice `slot` of it.

    With `projection=None` (a layer without a latent) it only takes them out.
    """
    attention.register_forward_pre_hook(partial(_lay_in, projection, slot), with_kwargs=True)
    # always_call: an exception inside must not leave a latent behind for the next call.
    attention.register_forward_hook(partial(_take_out, projection), always_call=True)


def _lay_in(
    projection: FusedProjection | None,
    slot: int,
    attention: nn.Module,  # noqa: ARG001 - the signature of a hook
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs = dict(kwargs)
    latents = kwargs.pop("latents", None)
    if projection is not None:
        projection.latent = None if latents is None else latents[:, slot]
    return args, kwargs


def _take_out(projection: FusedProjection | None, *hook_arguments: Any) -> None:  # noqa: ARG001
    if projection is not None:
        projection.latent = None


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
