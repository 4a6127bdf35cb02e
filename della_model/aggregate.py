"""The aggregate posterior q(z) = 1/N Σ_n q(z | x_n) of a set of documents."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from della_model.gaussian import LOG_SCALE_BOUND
from della_model.shapes import Float

# Documents that meet a chunk of draws at a time, and numbers alive in one such meeting: 4 MiB, so
# that the passes over them stay near a core's cache.
_DOCUMENTS_AT_ONCE = 128
_ELEMENTS_AT_ONCE = 2**20


@torch.no_grad()
def log_aggregate_posterior(
    feature_terms: Float[Tensor, "documents layers parameters"],
    latent_terms: Float[Tensor, "draws layers parameters"],
    latents: Float[Tensor, "draws layers latent"],
) -> Float[Tensor, " draws"]:
    """log 1/N Σ_n q(z | x_n) of each draw in nats, float64; N documents make the aggregate.

    q(z | x) = Π_l q(z_l | z_<l, x): every draw runs the chain of every document, whose posterior
    of layer l is `[μ; raw log σ]` = the document's term plus the draw's
    (`LatentChain.posterior_terms_of_features` and `…_of_latents`). Memory is bounded by constants
    beside the inputs and one number a (draw, document) pair of a chunk of draws.
    """
    loc, log_scale = (half.flatten(1).contiguous() for half in feature_terms.chunk(2, dim=-1))
    shift, log_scale_shift = (half.flatten(1) for half in latent_terms.chunk(2, dim=-1))
    centered = latents.flatten(1) - shift  # z − W_qh h: what is left to the document's own loc
    # Divided here, once a document and not once a pair: bounded_log_scale(x) = b tanh(x / b).
    log_scale, log_scale_shift = log_scale / LOG_SCALE_BOUND, log_scale_shift / LOG_SCALE_BOUND
    at_once = max(1, _ELEMENTS_AT_ONCE // (_DOCUMENTS_AT_ONCE * max(1, loc.shape[1])))
    found = [
        _log_mean_density(loc, log_scale, z, s)
        for z, s in zip(centered.split(at_once), log_scale_shift.split(at_once), strict=True)
    ]
    constant = 0.5 * math.log(2 * math.pi) * loc.shape[1]
    return torch.cat(found) - math.log(len(loc)) - constant


def _log_mean_density(
    loc: Float[Tensor, "documents size"],
    log_scale: Float[Tensor, "documents size"],
    centered: Float[Tensor, "draws size"],
    log_scale_shift: Float[Tensor, "draws size"],
) -> Float[Tensor, " draws"]:
    """log Σ_n of the unnormalised densities, in float64."""
    parts = []
    chunks = (loc.split(_DOCUMENTS_AT_ONCE), log_scale.split(_DOCUMENTS_AT_ONCE))
    for some_loc, some_scale in zip(*chunks, strict=True):
        # log N(z; μ, σ²) = −½ ((z − μ) / σ)² − log σ, summed over all layers and dimensions;
        # in place, because the pairs' numbers are by far the most that this touches.
        negative_log_scale = (log_scale_shift[:, None] + some_scale).tanh_().mul_(-LOG_SCALE_BOUND)
        volume = negative_log_scale.sum(-1)
        standardized = (centered[:, None] - some_loc).mul_(negative_log_scale.exp_())
        parts.append(volume - 0.5 * standardized.square_().sum(-1))
    return torch.cat(parts, dim=1).double().logsumexp(1)
