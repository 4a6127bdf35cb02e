"""How a layer's latent reaches its place inside that layer.

Latents travel as an argument and never as a setting: `latents` [B, L, p] is handed to the trunk,
which passes its keyword arguments to every block and attention (transformers' convention). There a
hook takes it out and gives the layer's own slice to the layer's fusions, for that one call. So a
block that is run again, as activation checkpointing does, sees the latents of its own batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from della_model.errors import ConfigError
from della_model.fusion import LatentMemory, LowRankTensorFusion, ValueFusion
from della_model.fusion.memory import ATTENTION_WITH_MEMORY
from della_model.shapes import Float


class SelfAttention(NamedTuple):
    """A decoder layer's self-attention: what an adapter tells of it.

    Attributes:
        module: transformers' own module; it hands keyword arguments on to its attention function.
        value_projection: the name of its part whose last outputs are the values of all heads.
        num_heads: heads that have keys and values of their own.
        head_size: width of one head.
    """

    module: nn.Module
    value_projection: str
    num_heads: int
    head_size: int

    @property
    def value_size(self) -> int:
        """Width of the values, all heads together."""
        return self.num_heads * self.head_size


class FusedProjection(nn.Module):
    """A projection whose last outputs are attention values, fused with a latent.

    The latent is laid in for one call. Without it, as in the encoder's pass, the outputs are the
    projection's own. Values are changed before the key-value cache sees them, so cached values stay
    fused and no step of generation does the work again.
    """

    def __init__(self, projection: nn.Module, fusion: ValueFusion, slot: int) -> None:
        super().__init__()
        self.projection = projection
        self.fusion = fusion
        self.slot = slot
        self.latent: Tensor | None = None

    def forward(
        self, hidden: Float[Tensor, "batch time hidden"]
    ) -> Float[Tensor, "batch time out"]:
        """The projection's outputs, the values among them fused."""
        outputs = self.projection(hidden)
        if self.latent is None:
            return outputs
        others = outputs.shape[-1] - self.fusion.value_size
        if others == 0:
            return self.fusion(outputs, self.latent)
        kept, values = outputs.split([others, self.fusion.value_size], dim=-1)
        return torch.cat([kept, self.fusion(values, self.latent)], dim=-1)


def place_fusion(attention: SelfAttention, fusion: ValueFusion, slot: int) -> None:
    """Wraps the projection of the values, for the latent `slot`."""
    name = attention.value_projection
    setattr(attention.module, name, FusedProjection(getattr(attention.module, name), fusion, slot))


def place_memory(attention: SelfAttention, memory: LatentMemory) -> None:
    """Gives a layer's attention one more key and value.

    An attention function of our own adds them. It is named in a configuration of this module alone,
    because the trunk makes its masks by the name in its own.

    Raises ConfigError for an implementation whose masks that function does not read.
    """
    module: Any = attention.module
    implementation = module.config._attn_implementation
    if implementation not in ("sdpa", "eager", None):
        raise ConfigError(
            f"attn_implementation: expected sdpa or eager with a fusion that has a memory, got "
            f"{implementation!r}: another key needs a column of the mask; use sdpa, or another "
            "fusion."
        )
    module.latent_memory = memory
    module.config = copy.copy(module.config)
    module.config._attn_implementation = ATTENTION_WITH_MEMORY


@contextmanager
def folded_fusions(
    trunk: nn.Module, latents: Float[Tensor, "documents layers latent"]
) -> Iterator[None]:
    """While the body runs, fusions that can are one matrix a document, made once.

    For generation, whose every step would else read the matrices of all ranks. It pays where there
    are fewer documents than ranks; with more, nothing is folded.

    Args:
        trunk: the decoder with its fusions in place.
        latents: of the documents, the same throughout the body.
    """
    able = [
        (part.fusion, part.slot)
        for part in trunk.modules()
        if isinstance(part, FusedProjection)
        and isinstance(part.fusion, LowRankTensorFusion)
        and len(latents) < part.fusion.rank
    ]
    try:
        for fusion, slot in able:
            fusion.folded = fusion.fold(latents[:, slot])
        yield
    finally:
        for fusion, _ in able:
            fusion.folded = None


def route_latent(attention: SelfAttention, slot: int | None) -> None:
    """Makes an attention take `latents` from its arguments and use the slice `slot` of them.

    To be called once its fusions are in place. With `slot=None` (a layer without a latent) it only
    takes them out.
    """
    lay_in = partial(_lay_in, attention.value_projection, slot)
    attention.module.register_forward_pre_hook(lay_in, with_kwargs=True)
    # always_call: an exception inside must not leave a latent behind for the next call.
    take_out = partial(_take_out, attention.value_projection)
    attention.module.register_forward_hook(take_out, always_call=True)


def _lay_in(
    value_projection: str,
    slot: int | None,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs = dict(kwargs)
    latents = kwargs.pop("latents", None)
    if latents is None or slot is None:
        return args, kwargs
    latent = latents[:, slot]
    projection = getattr(module, value_projection)
    if isinstance(projection, FusedProjection):
        projection.latent = latent
    memory = getattr(module, "latent_memory", None)
    if memory is not None:
        kwargs["memory"] = memory(latent)
    return args, kwargs


def _take_out(value_projection: str, module: nn.Module, *hook_arguments: Any) -> None:  # noqa: ARG001
    projection = getattr(module, value_projection)
    if isinstance(projection, FusedProjection):
        projection.latent = None
