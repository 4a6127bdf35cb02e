"""Likelihood bounds of documents, and what their latents are worth, by importance sampling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from pipeline.evaluation.blocks import Arrays
from pipeline.evaluation.reading import Batch
from pipeline.noise import Purpose, Stream, document_noise
from pipeline.specs.evaluate import EvaluationSpec

if TYPE_CHECKING:
    import torch

    from della_model import Della, ImportanceSamples


def document_figures(model: Della, batch: Batch, settings: EvaluationSpec) -> Arrays:
    """Figures of a batch's documents from K = `iw_samples` draws each, a row a document.

    Without latents all draws would be the same: there is one.

    - reconstruction_nll, kl_per_layer, kl_per_dimension: means over the draws, nats.
    - iw_nll: −log 1/K Σ_k w_k.
    - paper_iw_nll: the same with log-densities averaged over layers, which is no bound.
    - num_predicted: tokens without BOS, with EOS.
    - posterior_means: the chain run on posterior means.
    - latents, log_posterior: one draw z ~ q(z | x), and log q(z | x).
    - feature_terms, latent_terms: what every (z, x) pair's posterior is made of.
    """
    import torch

    from della_model import iw_nll_of_weights

    layers, size = model.config.num_latent_layers, model.config.latent_size
    num_draws = settings.iw_samples if layers else 1
    with torch.inference_mode():
        batch = batch.read_by(model)
        features = features_of(model, batch)
        means = model.chain.infer(features, _zeros(model, features))
        sums = torch.zeros(len(batch.places), layers, size, dtype=torch.float64).to(features.device)
        nll, log_ratio = [], []
        first: ImportanceSamples | None = None
        for samples in importance_chunks(model, batch, features, num_draws, settings):
            first = first or samples
            nll.append(samples.reconstruction_nll)
            log_ratio.append(samples.log_ratio_per_layer)
            sums += samples.sample.kl_per_dimension.double().sum(0)
        assert first is not None
        reconstruction_nll, log_ratios = torch.cat(nll), torch.cat(log_ratio)
        kl = sums / num_draws
        averaged = log_ratios.mean(-1) if layers else log_ratios.sum(-1)
        latents = first.sample.latents[0]
        found = {
            "reconstruction_nll": reconstruction_nll.mean(0),
            "kl_per_layer": kl.sum(-1),
            "kl_per_dimension": kl.float(),
            "iw_nll": iw_nll_of_weights(log_ratios.sum(-1) - reconstruction_nll, num_draws),
            "paper_iw_nll": iw_nll_of_weights(averaged - reconstruction_nll, num_draws),
            "num_predicted": batch.inputs["attention_mask"].sum(-1) - 1,
            "posterior_means": means.latents,
            "latents": latents,
            "log_posterior": first.sample.log_posterior[0].double().sum(-1),
            "log_prior": first.sample.log_prior[0].double().sum(-1),
        }
        if layers and settings.mutual_information:
            found["feature_terms"] = model.chain.posterior_terms_of_features(features)
            found["latent_terms"] = model.chain.posterior_terms_of_latents(latents)
        return {name: value.cpu().numpy() for name, value in found.items()}


def curve_figures(model: Della, batch: Batch, settings: EvaluationSpec) -> Arrays:
    """−ELBO and the importance-weighted bound for each K of `iw_curve`, all from the same draws."""
    import torch

    from della_model import iw_nll_of_weights

    most = max(settings.iw_curve)
    with torch.inference_mode():
        batch = batch.read_by(model)
        features = features_of(model, batch)
        elbo, weights = [], []
        for samples in importance_chunks(model, batch, features, most, settings):
            elbo.append(samples.reconstruction_nll + samples.sample.kl_per_layer.double().sum(-1))
            weights.append(samples.log_weights)
        log_weights = torch.cat(weights)
        bounds = [iw_nll_of_weights(log_weights, count) for count in settings.iw_curve]
        return {
            "negative_elbo": torch.cat(elbo).mean(0).cpu().numpy(),
            "iw_nll": torch.stack(bounds, dim=-1).cpu().numpy(),
        }


def importance_chunks(
    model: Della,
    batch: Batch,
    features: torch.Tensor,
    num_draws: int,
    settings: EvaluationSpec,
) -> Iterator[ImportanceSamples]:
    """`num_draws` draws of each document, as many at a time as `batch_tokens` hold."""
    import torch

    from della_model import importance_samples

    shape = (model.config.num_latent_layers, model.config.latent_size)
    stream = Stream(settings.seed, Purpose.LIKELIHOOD)
    at_once = max(1, settings.batch_tokens // batch.num_tokens)
    for first in range(0, num_draws, at_once):
        draws = range(first, min(first + at_once, num_draws))
        noise = np.stack([document_noise(stream, batch.places, shape, draw) for draw in draws])
        yield importance_samples(
            model,
            features=features,
            noise=torch.from_numpy(noise).to(features.device),
            **batch.inputs,
        )


def features_of(model: Della, batch: Batch) -> torch.Tensor:
    """x_l of each document [B, L, H]: the one pass of the encoder."""
    return model.features(**batch.inputs)


def posterior_means(model: Della, batch: Batch) -> torch.Tensor:
    """The chain run on posterior means, [B, L, p]."""
    import torch

    with torch.no_grad():
        features = features_of(model, batch)
        return model.chain.infer(features, _zeros(model, features)).latents


def _zeros(model: Della, features: torch.Tensor) -> torch.Tensor:
    import torch

    shape = (len(features), model.config.num_latent_layers, model.config.latent_size)
    return torch.zeros(shape, device=features.device)
