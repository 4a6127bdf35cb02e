"""Drawing tokens so that a document's text does not depend on what it is generated with."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


class DocumentSampler(LogitsProcessor):
    """Draws each document's next token by numbers of its own, one a token.

    transformers draws a whole batch from one generator, so a text changes with the texts beside
    it. Here each row's distribution is inverted at its own number, and all tokens but the one
    found are forbidden: greedy search then takes that one. It therefore goes with
    `do_sample=False`, and applies temperature, top_k and top_p itself, in transformers' order.

    Args:
        uniforms: numbers in [0, 1), [documents, new tokens].
        temperature: divides the logits; above 0.
        top_k: how many of the likeliest tokens can be drawn; 0: all.
        top_p: the probability mass that can be drawn from.
    """

    def __init__(
        self, uniforms: NDArray[np.float64], temperature: float, top_k: int, top_p: float
    ) -> None:
        self._uniforms = torch.from_numpy(uniforms)
        self._step = 0
        self._warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(temperature))]
        if top_k > 0:
            self._warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [documents, vocabulary] with one token left in each row."""
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        # float64: rounding in a sum over a large vocabulary would reach into the last tokens.
        cumulative = scores.double().softmax(-1).cumsum(-1)
        total = cumulative[:, -1:]
        numbers = self._uniforms[:, self._step, None].to(scores.device) * total
        self._step += 1
        # Below the total, which rounding may reach: there is a token for every number.
        numbers = torch.minimum(numbers, torch.nextafter(total, torch.zeros_like(total)))
        # The first token whose cumulative probability exceeds the number: never one of mass zero.
        chosen = torch.searchsorted(cumulative, numbers, right=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)
