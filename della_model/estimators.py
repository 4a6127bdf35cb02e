"""Estimates of log p(x) that are bounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from della_model.model import Della
from della_model.shapes import Bool, Float, Int


@torch.no_grad()
def iw_log_weights(
    model: Della,
    input_ids: Int[Tensor, "batch time"],
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
    noise: Float[Tensor, "draws batch layers latent"],
    chunk_size: int = 8,
) -> Float[Tensor, "draws batch"]:
    """log w_k = log p(x | z^k) + Σ_l log p(z_l^k | ·) − Σ_l log q(z_l^k | ·) in nats, float64.

    The encoder runs once a document; the decoder once a draw, `chunk_size` draws at a time. The
    caller puts the model in evaluation mode.
    """
    sample = model.infer(input_ids, attention_mask, noise)
    log_ratio = (sample.log_prior - sample.log_posterior).double().sum(-1)
    log_likelihood = [
        _log_likelihood(model, input_ids, attention_mask, latents)
        for latents in sample.latents.split(max(1, chunk_size))
    ]
    return torch.cat(log_likelihood) + log_ratio


def iw_nll(
    model: Della,
    input_ids: Int[Tensor, "batch time"],
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
    noise: Float[Tensor, "draws batch layers latent"],
    chunk_size: int = 8,
) -> Float[Tensor, " batch"]:
    """−log 1/K Σ_k w_k in nats (Burda et al. 2016), float64.

    In expectation an upper bound of −log p(x) that falls with K; for K = 1 a one-draw estimate of
    the negative ELBO.
    """
    log_weights = iw_log_weights(model, input_ids, attention_mask, noise, chunk_size)
    return math.log(len(log_weights)) - log_weights.logsumexp(0)


def _log_likelihood(
    model: Della, input_ids: Tensor, attention_mask: Tensor, latents: Tensor
) -> Float[Tensor, "draws batch"]:
    draws, batch = latents.shape[:2]
    nll = model.reconstruction_nll(
        input_ids.repeat(draws, 1), attention_mask.repeat(draws, 1), latents.flatten(0, 1)
    )
    return -nll.double().view(draws, batch)
