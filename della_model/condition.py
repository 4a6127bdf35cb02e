"""What documents are generated from: a condition c, and what the model keeps of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from della_model.shapes import Bool, Float, Int


class Condition(NamedTuple):
    """A source for each document: BOS, its tokens, EOS; padded at the right or at the left."""

    input_ids: Int[Tensor, "batch source"]
    attention_mask: Int[Tensor, "batch source"] | Bool[Tensor, "batch source"]


@dataclass(frozen=True)
class Reading:
    """Sources that were read once, for the chain and for any number of decoder passes.

    Attributes:
        condition: the sources themselves; a decoder-only backbone has them before its documents.
        features: c_l, for each latent.
        states: of an encoder–decoder backbone: what its cross-attention looks at; else None.
    """

    condition: Condition
    features: Float[Tensor, "batch layers hidden"]
    states: Float[Tensor, "batch source hidden"] | None = None

    def repeat(self, times: int) -> Reading:
        """The whole batch over again, `times` times."""
        ids, mask = (tensor.repeat(times, 1) for tensor in self.condition)
        states = None if self.states is None else self.states.repeat(times, 1, 1)
        return Reading(Condition(ids, mask), self.features.repeat(times, 1, 1), states)


def padded_left(condition: Condition) -> Condition:
    """The same rows with all padding at the left, where generation wants it."""
    # A stable sort by the mask: padding first, tokens in their order.
    order = condition.attention_mask.long().argsort(dim=-1, stable=True)
    ids, mask = (tensor.gather(1, order) for tensor in condition)
    return Condition(ids, mask)


def beside(sources: Condition, documents: Condition) -> Condition:
    """Each source with its document behind it; what padding they have stays where it is."""
    ids = torch.cat([sources.input_ids, documents.input_ids], dim=1)
    masks = sources.attention_mask.long(), documents.attention_mask.long()
    return Condition(ids, torch.cat(masks, dim=1))


@dataclass(frozen=True)
class Joined:
    """Documents right behind their sources, all padding at the right: no more than it takes.

    A gap between the two would shift a window of attention that counts positions.
    """

    input_ids: Int[Tensor, "batch joined"]
    attention_mask: Int[Tensor, "batch joined"]
    places: Int[Tensor, "batch time"]  # where each position of a document has gone

    @classmethod
    def of(cls, sources: Condition, documents: Condition) -> Joined:
        """Joins each source and its document."""
        ids, mask = beside(sources, documents)
        order = mask.argsort(dim=-1, descending=True, stable=True)
        width = int(mask.sum(-1).max())
        places = order.argsort(dim=-1)[:, sources.input_ids.shape[1] :].clamp(max=width - 1)
        return cls(ids.gather(1, order)[:, :width], mask.gather(1, order)[:, :width], places)

    def of_documents(
        self, hidden: Float[Tensor, "batch joined hidden"]
    ) -> Float[Tensor, "batch time hidden"]:
        """The hidden states of the documents' own positions; any value on their padding."""
        return hidden.gather(1, self.places[..., None].expand(-1, -1, hidden.shape[-1]))
