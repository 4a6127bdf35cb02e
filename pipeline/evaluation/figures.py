"""From figures of documents to figures of a split, each with its standard error over documents.

All sums run in document order in float64, so they depend on neither workers nor batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.evaluation.documents import DocumentFigures, Floats, Integers

ACTIVE_ABOVE = (0.01, 0.2)  # variances of a dimension's posterior mean that count as active
COLLAPSED_BELOW = 0.1  # nats a document: a KL this small carries no word


@dataclass(frozen=True)
class Label:
    """How a figure is shown: its name, its unit and what it means."""

    title: str
    unit: str
    meaning: str


LABELS: dict[str, Label] = {
    "reconstruction_nll": Label(
        "Reconstruction NLL", "nats/document", "−log p(x|z), one draw of z from the posterior"
    ),
    "kl": Label("KL", "nats/document", "posterior to prior, summed over layers"),
    "negative_elbo": Label("−ELBO", "nats/document", "reconstruction + KL: an upper bound of NLL"),
    "iw_nll": Label(
        "IW-NLL", "nats/document", "importance-weighted, the tightest upper bound of NLL here"
    ),
    "ppl_token": Label("Perplexity per token", "", "from IW-NLL, over predicted tokens"),
    "ppl_word": Label("Perplexity per word", "", "from IW-NLL, over words of the raw text"),
    "ppl_token_elbo": Label("Perplexity per token, ELBO", "", "from −ELBO: the looser bound"),
}


def summarize(documents: DocumentFigures, iw_samples: int) -> dict[str, Any]:
    """Figures of all documents together, as plain JSON values.

    Nats are means over documents, after sums over tokens and layers. A figure that does not exist
    is None: the standard error of a single document, a perplexity per word of a text without words.

    Raises:
        UserError: if a document's figures are NaN or infinite.
    """
    _require_finite(documents)
    kl = documents.kl_per_layer.sum(axis=1)
    negative_elbo = documents.reconstruction_nll + kl
    tokens, words = documents.num_predicted, documents.num_words
    pairs = {
        "reconstruction_nll": _mean(documents.reconstruction_nll),
        "kl": _mean(kl),
        "negative_elbo": _mean(negative_elbo),
        "iw_nll": _mean(documents.iw_nll),
        "ppl_token": _perplexity(documents.iw_nll, tokens),
        "ppl_word": _perplexity(documents.iw_nll, words),
        "ppl_token_elbo": _perplexity(negative_elbo, tokens),
    }
    layers = [_mean(column) for column in documents.kl_per_layer.T]
    variance = documents.posterior_means.variance
    figures: dict[str, Any] = {name: value for name, (value, _) in pairs.items()}
    figures |= {
        "kl_per_layer": [value for value, _ in layers],
        "iw_samples": iw_samples,
        "active_units": {
            f"{bound:g}": [int(n) for n in (variance > bound).sum(axis=1)] for bound in ACTIVE_ABOVE
        },
        "latent_size": int(variance.shape[1]),
        "num_documents": documents.num_documents,
        "num_tokens": int(tokens.sum()),
        "num_words": int(words.sum()),
        "standard_errors": {name: error for name, (_, error) in pairs.items()}
        | {"kl_per_layer": [error for _, error in layers]},
    }
    return figures | {"collapsed": collapse(figures) is not None}


def collapse(figures: dict[str, Any]) -> str | None:
    """Say in a sentence that the latents are collapsed, or None when they live."""
    if figures["kl"] < COLLAPSED_BELOW:
        return (
            f"The latents are collapsed: the posterior carries {figures['kl']:.3g} nats a document "
            "beyond the prior, so the decoder works as a plain language model. An autoencoder "
            "start (train.beta.delay) or free bits (train.free_bits) can keep them alive."
        )
    lowest = f"{min(ACTIVE_ABOVE):g}"
    if figures["num_documents"] > 1 and not any(figures["active_units"][lowest]):
        return (
            f"The latents are collapsed: they cost {figures['kl']:.3g} nats a document, but no "
            f"dimension's posterior mean varies with the document by more than {lowest}, so they "
            "tell nothing about it. An autoencoder start (train.beta.delay) can help."
        )
    return None


def _require_finite(documents: DocumentFigures) -> None:
    kl = documents.kl_per_layer.sum(axis=1)
    total = documents.reconstruction_nll + kl + documents.iw_nll
    bad = np.flatnonzero(~np.isfinite(total))
    if len(bad):
        raise UserError(
            f"{len(bad)} of {documents.num_documents} documents have NaN or infinite figures (the "
            f"first is document {bad[0]}): expected finite nats, and a mean over them would be "
            "worthless; the weights overflow on them: train with a lower train.learning_rate."
        )


def _mean(values: Floats) -> tuple[float, float | None]:
    """Mean over documents, and its standard error."""
    count = len(values)
    mean = float(values.sum() / count)
    if count < 2:
        return mean, None
    deviations = float(np.square(values - mean).sum())
    return mean, math.sqrt(deviations / (count - 1) / count)


def _perplexity(nll: Floats, units: Integers) -> tuple[float | None, float | None]:
    """exp(Σ nll / Σ units), and its standard error over documents.

    The error is the delta method's for a ratio of two means, then for the exponential:
    documents are what was drawn, so both sums vary with them.
    """
    count, total = len(nll), int(units.sum())
    if total == 0:
        return None, None
    rate = float(nll.sum()) / total
    try:
        perplexity = math.exp(rate)
    except OverflowError:
        return None, None
    if count < 2:
        return perplexity, None
    residuals = float(np.square(nll - rate * units).sum())
    rate_error = math.sqrt(residuals / (count - 1) / count) / (total / count)
    return perplexity, perplexity * rate_error


def shown(value: float | None, error: float | None) -> tuple[str, str]:
    """A figure and its error as text: as many decimals as two digits of the error have."""
    if value is None:
        return "–", "–"
    if error is None or error <= 0:
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}", "–"
    decimals = min(max(1 - math.floor(math.log10(error)), 0), 6)
    return f"{value:,.{decimals}f}", f"{error:,.{decimals}f}"
