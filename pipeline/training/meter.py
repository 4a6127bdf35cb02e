"""Sums over steps and workers, and the rows of metrics that come out of them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed

_ALWAYS = ("loss", "reconstruction_nll", "kl", "num_documents", "num_tokens")
_AIDS = ("bag_of_words_nll",)  # of those objectives alone that have the term
_SCALARS = _ALWAYS + _AIDS


class Meter:
    """Adds up sums over documents on this worker; `reduced` adds them over all workers.

    One vector holds them all, so that a row costs one collective, and no step costs any.

    Args:
        num_layers: L, the latents of a document.
        device: where the sums come from.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self._seen: set[str] = set()
        self._sums = torch.zeros(len(_SCALARS) + num_layers, dtype=torch.float64, device=device)

    def add(self, sums: dict[str, torch.Tensor], loss_scale: float = 1.0) -> None:
        """Add the sums of one forward; `loss_scale` turns its loss into a sum over documents."""
        for index, name in enumerate(_SCALARS):
            if name not in sums:
                continue
            self._seen.add(name)
            self._sums[index] += sums[name] * (loss_scale if name == "loss" else 1.0)
        self._sums[len(_SCALARS) :] += sums["kl_per_layer"]

    @property
    def local(self) -> list[float]:
        """This worker's sums, for a checkpoint."""
        sums: list[float] = self._sums.tolist()
        return sums

    def restore(self, sums: list[float]) -> None:
        """Go on from what `local` was; [] is a start at zero."""
        if sums:
            self._sums.copy_(torch.tensor(sums, dtype=torch.float64))

    def reduced(self) -> dict[str, Any]:
        """Means over all workers' documents in nats, and the counts; starts over.

        A collective call. Keys: loss, reconstruction_nll, kl, kl_per_layer, negative_elbo,
        num_documents, num_tokens; bag_of_words_nll, without its weight, where the loss has it.
        """
        torch.distributed.all_reduce(self._sums)
        sums = self._sums.tolist()
        self._sums.zero_()
        totals = dict(zip(_SCALARS, sums, strict=False))
        documents = max(totals["num_documents"], 1.0)
        row: dict[str, Any] = {
            name: totals[name] / documents for name in ("loss", "reconstruction_nll", "kl")
        }
        row["negative_elbo"] = row["reconstruction_nll"] + row["kl"]
        row["kl_per_layer"] = [value / documents for value in sums[len(_SCALARS) :]]
        row["num_documents"] = int(totals["num_documents"])
        row["num_tokens"] = int(totals["num_tokens"])
        row |= {name: totals[name] / documents for name in _AIDS if name in self._seen}
        return row


def perplexity(row: dict[str, Any]) -> float:
    """exp(negative ELBO / predicted tokens): an upper bound on the perplexity per token."""
    nats_per_token = row["negative_elbo"] * row["num_documents"] / max(row["num_tokens"], 1)
    return math.exp(min(nats_per_token, 700.0))  # above, a float overflows
