"""Estimates of log p(x) that are bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from della_model.condition import Condition, Reading
from della_model.latents import LatentSample
from della_model.model import Della
from della_model.shapes import Bool, Float, Int


@dataclass(frozen=True)
class ImportanceSamples:
    """Draws z^k ~ q(z | x) of each document of a batch, with all that weights them."""

    reconstruction_nll: Float[Tensor, "draws batch"]  # −log p(x | z^k), float64
    sample: LatentSample  # [draws, batch, layers, latent]

    @property
    def log_ratio_per_layer(self) -> Float[Tensor, "draws batch layers"]:
        """log p(z_l^k | z_<l^k) − log q(z_l^k | z_<l^k, x) in nats, float64."""
        return self.sample.log_prior.double() - self.sample.log_posterior.double()

    @property
    def log_weights(self) -> Float[Tensor, "draws batch"]:
        """log p(x | z^k) + Σ_l log p(z_l^k | ·) − Σ_l log q(z_l^k | ·) in nats, float64."""
        return self.log_ratio_per_layer.sum(-1) - self.reconstruction_nll


@torch.no_grad()
def importance_samples(
    model: Della,
    input_ids: Int[Tensor, "batch time"],
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
    features: Float[Tensor, "batch layers hidden"],
    noise: Float[Tensor, "draws batch layers latent"],
    condition: Condition | Reading | None = None,
) -> ImportanceSamples:
    """All draws of `noise` at once, in one pass of the decoder.

    `features` are the batch's, from `model.features`: they are the same for every draw, so a
    caller that makes its draws chunk by chunk runs the encoder once; so is what `model.read` gives
    of a `condition`. The caller puts the model in evaluation mode.
    """
    sample = model.chain.infer(features, noise)
    reading = None if condition is None else model.read(condition)
    draws, batch = noise.shape[:2]
    nll = model.reconstruction_nll(
        input_ids.repeat(draws, 1),
        attention_mask.repeat(draws, 1),
        sample.latents.flatten(0, 1),
        None if reading is None else reading.repeat(draws),
    )
    return ImportanceSamples(nll.double().view(draws, batch), sample)


@torch.no_grad()
def iw_log_weights(
    model: Della,
    input_ids: Int[Tensor, "batch time"],
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
    noise: Float[Tensor, "draws batch layers latent"],
    chunk_size: int = 8,
    condition: Condition | None = None,
) -> Float[Tensor, "draws batch"]:
    """log w_k = log p(x | z^k) + Σ_l log p(z_l^k | ·) − Σ_l log q(z_l^k | ·) in nats, float64.

    The encoder runs once a document; the decoder once a draw, `chunk_size` draws at a time.
    """
    reading = None if condition is None else model.read(condition)
    features = model.features(input_ids, attention_mask, reading)
    chunks = noise.split(max(1, chunk_size))
    return torch.cat(
        [
            importance_samples(
                model, input_ids, attention_mask, features, chunk, reading
            ).log_weights
            for chunk in chunks
        ]
    )


def iw_nll(
    model: Della,
    input_ids: Int[Tensor, "batch time"],
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
    noise: Float[Tensor, "draws batch layers latent"],
    chunk_size: int = 8,
    condition: Condition | None = None,
) -> Float[Tensor, " batch"]:
    """−log 1/K Σ_k w_k in nats (Burda et al. 2016), float64.

    In expectation an upper bound of −log p(x) that falls with K; for K = 1 a one-draw estimate of
    the negative ELBO.
    """
    log_weights = iw_log_weights(model, input_ids, attention_mask, noise, chunk_size, condition)
    return iw_nll_of_weights(log_weights, len(log_weights))


def iw_nll_of_weights(
    log_weights: Float[Tensor, "draws batch"], num_samples: int
) -> Float[Tensor, " batch"]:
    """−log 1/K Σ_k w_k for K = `num_samples`, from at least as many draws.

    More draws are cut into groups of K whose bounds are averaged: the same expectation, with less
    variance than one group has. What is left over is not used.
    """
    groups = len(log_weights) // num_samples
    used = log_weights[: groups * num_samples].unflatten(0, (groups, num_samples))
    return (math.log(num_samples) - used.logsumexp(1)).mean(0)
