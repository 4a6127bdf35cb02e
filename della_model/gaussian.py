"""Diagonal Gaussians, in natural logarithms, summed over their last dimension."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from della_model.shapes import Float

# Scales stay within exp(±5), that is from 0.007 to 148. Wide enough never to bind in a sound run,
# narrow enough that a ratio of two variances, e^20, is finite in float32.
LOG_SCALE_BOUND = 5.0
_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 and float16 become float32; float64 stays.

    A KL is a small difference of larger terms: 8 bits of mantissa would lose it.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def bounded_log_scale(raw: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Maps any real to (-LOG_SCALE_BOUND, LOG_SCALE_BOUND), near the identity around 0.

    A clamp would have no gradient outside its bounds, and a scale that ran out could not return.
    """
    return LOG_SCALE_BOUND * torch.tanh(at_least_float32(raw) / LOG_SCALE_BOUND)


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(loc, diag exp(log_scale)²); the event is the last dimension."""

    loc: Float[Tensor, "*batch event"]
    log_scale: Float[Tensor, "*batch event"]

    @classmethod
    def standard(
        cls,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> DiagonalGaussian:
        """N(0, I) of the given shape."""
        zeros = torch.zeros(*shape, dtype=dtype, device=device)
        return cls(zeros, zeros)

    @classmethod
    def from_raw(cls, raw: Float[Tensor, "*batch twice"]) -> DiagonalGaussian:
        """From a head's output `[loc; raw log-scale]`, in float32 or more."""
        loc, raw_log_scale = at_least_float32(raw).chunk(2, dim=-1)
        return cls(loc, bounded_log_scale(raw_log_scale))

    @property
    def scale(self) -> Float[Tensor, "*batch event"]:
        """Standard deviation."""
        return self.log_scale.exp()

    def rsample(self, noise: Float[Tensor, "*noise_batch event"]) -> Float[Tensor, "*out event"]:
        """loc + scale · noise, with noise ~ N(0, I) drawn by the caller; gradients pass."""
        return self.loc + self.scale * noise

    def log_prob(self, value: Float[Tensor, "*value_batch event"]) -> Float[Tensor, "*out"]:
        """log N(value; loc, scale²) in nats, summed over the event."""
        standardized = (value - self.loc) * (-self.log_scale).exp()
        return -(0.5 * standardized.square() + self.log_scale + _HALF_LOG_TWO_PI).sum(-1)

    def kl_divergence(self, other: DiagonalGaussian) -> Float[Tensor, "*out"]:
        """KL(self ‖ other) in nats, summed over the event."""
        return self.kl_per_dimension(other).sum(-1)

    def kl_per_dimension(self, other: DiagonalGaussian) -> Float[Tensor, "*out event"]:
        """KL(self ‖ other) in nats, of each dimension of the event alone.

        With d = log(scale/other.scale): ½ (e^{2d} − 1 − 2d + ((loc − other.loc)/other.scale)²).
        expm1 keeps the small KLs of a posterior close to its prior exact and non-negative.
        """
        log_ratio = self.log_scale - other.log_scale
        shift = (self.loc - other.loc) * (-other.log_scale).exp()
        return 0.5 * (torch.expm1(2 * log_ratio) - 2 * log_ratio + shift.square())
