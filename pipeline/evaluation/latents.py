"""What a worker measures of the latents beside likelihoods: their reach, and their aggregate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.blocks import Arrays
from pipeline.evaluation.likelihood import posterior_means
from pipeline.evaluation.reading import Document, make_batch

if TYPE_CHECKING:
    from della_model import Della


def probe_figures(
    model: Della, documents: Sequence[Document], partners: Sequence[Document]
) -> Arrays:
    """How each document's output changes when a layer's latent is its partner's.

    Rows are documents; columns are the layers one by one, then all of them together. Both
    documents' latents are their posterior means.
    """
    import torch

    from della_model import swap_effect

    rows: dict[str, list[NDArray[np.float64]]] = {"token_kl": [], "logit_change": [], "nll": []}
    # One at a time: the logits of a whole vocabulary, twice, are the largest tensors of all.
    for document, partner in zip(documents, partners, strict=True):
        own, other = (make_batch([one], model.device) for one in (document, partner))
        with torch.inference_mode():
            latents, swapped = posterior_means(model, own), posterior_means(model, other)
            effect = swap_effect(model, latents=latents, partners=swapped, **own.inputs)
        rows["token_kl"].append(effect.token_kl[:, 0].cpu().numpy())
        rows["logit_change"].append(effect.logit_change[:, 0].cpu().numpy())
        rows["nll"].append(effect.nll_increase[:, 0].cpu().numpy())
    return {name: np.stack(values) for name, values in rows.items()}


def aggregate_figures(
    feature_terms: NDArray[np.float32],
    latent_terms: NDArray[np.float32],
    latents: NDArray[np.float32],
    device: str,
) -> Arrays:
    """log q(z) of each draw, q the aggregate posterior over all of `feature_terms`' documents."""
    import torch

    from della_model import log_aggregate_posterior

    # Ray hands out read-only arrays; torch would warn of them, though nothing here writes.
    given = (np.array(array) for array in (feature_terms, latent_terms, latents))
    found = log_aggregate_posterior(*(torch.from_numpy(array).to(device) for array in given))
    return {"log_aggregate": found.cpu().numpy()}
