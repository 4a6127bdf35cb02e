"""From figures of documents to figures of a split, each with its standard error over documents.

All sums run in document order in float64, so they depend on neither workers nor batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.evaluation.blocks import Arrays
from pipeline.evaluation.metrics.errors import Pair, mean, perplexity

ACTIVE_ABOVE = (0.01, 0.2)  # variances of a dimension's posterior mean that count as active
COLLAPSED_BELOW = 0.1  # nats a document: a KL this small carries no word
SATURATED_WITHIN = 0.1  # nats below log N: an estimate of MI this high says little more
SHOWN_POINTS = 1000  # of the latent space in two dimensions

PAPER_CONVENTION = (
    "These average the KL and the log-densities of the latents over layers, as the published code "
    "does, and divide by all tokens, the first among them, which nothing predicts. An average over "
    "L layers counts 1/L of what the latents cost, so these are no bounds of log p(x): compare "
    "them with the paper's tables and with nothing else."
)


@dataclass(frozen=True)
class Label:
    """How a figure is shown: its name, its unit and what it means."""

    title: str
    unit: str
    meaning: str


LABELS: dict[str, Label] = {
    "reconstruction_nll": Label("Reconstruction NLL", "nats/document", "−log p(x|z), z ~ q(z|x)"),
    "kl": Label("KL", "nats/document", "posterior to prior, summed over layers"),
    "negative_elbo": Label("−ELBO", "nats/document", "reconstruction + KL: an upper bound of NLL"),
    "iw_nll": Label(
        "IW-NLL", "nats/document", "importance-weighted, the tightest upper bound of NLL here"
    ),
    "elbo_gap": Label("Gap", "nats/document", "−ELBO less IW-NLL: what the posterior misses"),
    "ppl_token": Label("Perplexity per token", "", "from IW-NLL, over predicted tokens"),
    "ppl_word": Label("Perplexity per word", "", "from IW-NLL, over words of the raw text"),
    "ppl_token_elbo": Label("Perplexity per token, ELBO", "", "from −ELBO: the looser bound"),
    "mutual_information": Label("MI", "nats", "of document and latents, at most log N and the KL"),
}


def summarize(
    documents: Arrays, iw_samples: int, num_words: NDArray[np.integer[Any]]
) -> dict[str, Any]:
    """Figures of all documents together, as plain JSON values.

    Nats are means over documents, after sums over tokens and layers. A figure that does not exist
    is None: the standard error of a single document, a perplexity per word of a text without words.

    Args:
        documents: `pipeline.evaluation.likelihood.document_figures` of all, in their order.
        iw_samples: the K behind them.
        num_words: words of each document's raw text.

    Raises:
        UserError: if a document's figures are NaN or infinite.
    """
    _require_finite(documents)
    reconstruction, kl_per_layer = documents["reconstruction_nll"], documents["kl_per_layer"]
    kl = kl_per_layer.sum(axis=1)
    negative_elbo, iw_nll = reconstruction + kl, documents["iw_nll"]
    tokens, words = documents["num_predicted"], num_words.astype(np.int64)
    pairs = {
        "reconstruction_nll": mean(reconstruction),
        "kl": mean(kl),
        "negative_elbo": mean(negative_elbo),
        "iw_nll": mean(iw_nll),
        "elbo_gap": mean(negative_elbo - iw_nll),
        "ppl_token": perplexity(iw_nll, tokens),
        "ppl_word": perplexity(iw_nll, words),
        "ppl_token_elbo": perplexity(negative_elbo, tokens),
    }
    layers = [mean(column) for column in kl_per_layer.T]
    dimensions = [
        [mean(values.astype(np.float64)) for values in layer.T]
        for layer in np.moveaxis(documents["kl_per_dimension"], 1, 0)
    ]
    figures: dict[str, Any] = {name: value for name, (value, _) in pairs.items()}
    figures |= {
        "kl_per_layer": [value for value, _ in layers],
        "kl_per_dimension": [[value for value, _ in layer] for layer in dimensions],
        "iw_samples": iw_samples,
        "num_documents": len(iw_nll),
        "num_tokens": int(tokens.sum()),
        "num_words": int(words.sum()),
        "standard_errors": {name: error for name, (_, error) in pairs.items()}
        | {
            "kl_per_layer": [error for _, error in layers],
            "kl_per_dimension": [[error for _, error in layer] for layer in dimensions],
        },
        "paper_convention": paper_convention(documents),
    }
    figures |= active_units(documents["posterior_means"])
    return figures | {"collapsed": collapse(figures) is not None}


def active_units(posterior_means: NDArray[np.float32]) -> dict[str, Any]:
    """How many dimensions of each layer vary with the document (Burda et al. 2016).

    A dimension's variance is that of its posterior mean over documents; a dimension above a bound
    is active.
    """
    count, layers, size = posterior_means.shape
    values = posterior_means.astype(np.float64)
    squares = np.square(values - values.mean(axis=0)).sum(axis=0)
    variance = squares / max(count - 1, 1)
    return {
        "active_units": {
            f"{bound:g}": [int(n) for n in (variance > bound).sum(axis=1)] for bound in ACTIVE_ABOVE
        },
        "posterior_mean_variance": variance.tolist(),
        "latent_size": size if layers else 0,
    }


def paper_convention(documents: Arrays) -> dict[str, Any]:
    """The figures as the published code computes them: for comparison with its tables alone."""
    kl_per_layer = documents["kl_per_layer"]
    kl = kl_per_layer.mean(axis=1) if kl_per_layer.shape[1] else kl_per_layer.sum(axis=1)
    all_tokens = documents["num_predicted"] + 1
    pairs: dict[str, Pair] = {
        "kl": mean(kl),
        "negative_elbo": mean(documents["reconstruction_nll"] + kl),
        "ppl": perplexity(documents["paper_iw_nll"], all_tokens),
    }
    return {
        **{name: value for name, (value, _) in pairs.items()},
        "standard_errors": {name: error for name, (_, error) in pairs.items()},
        "sentence": PAPER_CONVENTION,
    }


def mutual_information(
    documents: Arrays, log_aggregate: NDArray[np.float64], conditional: bool
) -> dict[str, Any]:
    """MI of document and latents, E_x E_q [log q(z|x) − log q(z)], by one draw a document.

    The same draws give E[KL] = MI + KL(q(z) ‖ p(z)), whose last term cannot be negative: a negative
    one, beyond its error, means that something is wrong and is said. Of conditional data the prior
    is the source's own, so that this does not hold and is not asked.
    """
    count = len(log_aggregate)
    value, error = mean(documents["log_posterior"] - log_aggregate)
    assert value is not None
    limit = math.log(count)
    found: dict[str, Any] = {
        "log_documents": limit,
        "saturated": count > 1 and limit - value < SATURATED_WITHIN,
        "sentence": None,
    }
    kl, _ = mean(documents["log_posterior"] - documents["log_prior"])
    if not conditional:
        marginal, marginal_error = mean(log_aggregate - documents["log_prior"])
        assert marginal is not None
        below = marginal + 4 * (marginal_error or 0.0) < 0
        found |= {"kl": kl, "aggregate_kl": marginal, "above_kl": below}
        if below:
            found["sentence"] = (
                f"MI is estimated as {value:.3g} nats, above E[KL] = {kl:.3g}, which cannot be: "
                "do not believe either before the cause is found."
            )
    if found["saturated"] and found["sentence"] is None:
        found["sentence"] = (
            f"MI has reached log N = {limit:.3g} nats, the most that {count:,} documents can show: "
            "the latents tell all of them apart, and what they carry beyond that is not seen here."
        )
    return {
        "mutual_information": value,
        "mutual_information_error": error,
        "aggregate_posterior": found,
    }


def curve_figures(curve: Arrays, samples: tuple[int, ...]) -> dict[str, Any]:
    """The importance-weighted bound and its gap to −ELBO by K, over the curve's documents."""
    points = []
    for column, count in enumerate(samples):
        bound = curve["iw_nll"][:, column]
        value, error = mean(bound)
        gap, gap_error = mean(curve["negative_elbo"] - bound)
        points.append(
            {"samples": count, "iw_nll": value, "error": error, "gap": gap, "gap_error": gap_error}
        )
    value, error = mean(curve["negative_elbo"])
    return {
        "num_documents": len(curve["negative_elbo"]),
        "negative_elbo": value,
        "error": error,
        "points": points,
    }


def probe_figures(probe: Arrays) -> dict[str, Any]:
    """What swapping a layer's latent does, layer by layer; and all layers at once."""
    rows = []
    for column in range(probe["token_kl"].shape[1]):
        row: dict[str, Any] = {}
        for name in ("token_kl", "logit_change", "nll"):
            row[name], row[f"{name}_error"] = mean(probe[name][:, column])
        rows.append(row)
    return {"num_documents": len(probe["token_kl"]), "layers": rows[:-1], "all_layers": rows[-1]}


def projection(
    posterior_means: NDArray[np.float32], num_predicted: NDArray[np.int64]
) -> dict[str, Any] | None:
    """The posterior means of all layers on their two first principal axes.

    None where there are no two axes. Points are [x, y, tokens] of documents spread over all;
    `shares` are the axes' shares of the variance.
    """
    flat = posterior_means.reshape(len(posterior_means), -1).astype(np.float64)
    if flat.shape[1] < 2 or len(flat) < 3:
        return None
    centered = flat - flat.mean(axis=0)
    variances, axes = np.linalg.eigh(centered.T @ centered)
    axes, total = axes[:, ::-1][:, :2], float(variances.clip(min=0).sum())
    if total == 0:
        return None
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])  # an axis has no sign
    chosen = np.unique(np.linspace(0, len(flat) - 1, min(SHOWN_POINTS, len(flat))).astype(int))
    points = centered[chosen] @ axes
    return {
        "points": [
            [round(float(x), 4), round(float(y), 4), int(tokens)]
            for (x, y), tokens in zip(points, num_predicted[chosen], strict=True)
        ],
        "shares": [float(v) / total for v in variances[::-1][:2]],
    }


def collapse(figures: Mapping[str, Any]) -> str | None:
    """Say in a sentence that the latents are collapsed, or None when they live or there is none."""
    if not figures["kl_per_layer"]:
        return None
    if figures["kl"] < COLLAPSED_BELOW:
        return (
            f"The latents are collapsed: the posterior carries {figures['kl']:.3g} nats a document "
            "beyond the prior, so the decoder works as a plain language model. Free bits "
            "(train.free_bits) or an autoencoder start (train.beta.delay) can keep them alive."
        )
    lowest = f"{min(ACTIVE_ABOVE):g}"
    if figures["num_documents"] > 1 and not any(figures["active_units"][lowest]):
        return (
            f"The latents are collapsed: they cost {figures['kl']:.3g} nats a document, but no "
            f"dimension's posterior mean varies with the document by more than {lowest}, so they "
            "tell nothing about it. Free bits (train.free_bits) can help."
        )
    return None


def verdict(figures: Mapping[str, Any]) -> str:
    """Whether the latents live, in a sentence."""
    sentence = collapse(figures)
    if sentence is not None:
        return sentence
    if not figures["kl_per_layer"]:
        return "This model has no latents: it is a plain language model, to compare others with."
    active = figures["active_units"][f"{min(ACTIVE_ABOVE):g}"]
    size = figures.get("latent_size", 0) * len(active)
    return (
        f"The latents live: they carry {figures['kl']:.3g} nats a document, and {sum(active)} "
        f"of {size} dimensions vary with it."
    )


def _require_finite(documents: Arrays) -> None:
    kl = documents["kl_per_layer"].sum(axis=1)
    total = documents["reconstruction_nll"] + kl + documents["iw_nll"]
    bad = np.flatnonzero(~np.isfinite(total))
    if len(bad):
        raise UserError(
            f"{len(bad)} of {len(total)} documents have NaN or infinite figures (the "
            f"first is document {bad[0]}): expected finite nats, and a mean over them would be "
            "worthless; the weights overflow on them: train with a lower train.learning_rate."
        )


def shown(value: float | None, error: float | None) -> tuple[str, str]:
    """A figure and its error as text: as many decimals as two digits of the error have."""
    if value is None:
        return "–", "–"
    if error is None or error <= 0:
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}", "–"
    decimals = min(max(1 - math.floor(math.log10(error)), 0), 6)
    return f"{value:,.{decimals}f}", f"{error:,.{decimals}f}"
