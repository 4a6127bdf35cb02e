"""Documents of a split by their place, as a worker of the evaluation reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from della_model import Della
    from pipeline.shards import Documents, Split

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Document:
    """Token ids from BOS to EOS; of conditional data also those of the source."""

    place: int  # in the split
    tokens: Tokens
    condition: Tokens | None

    @property
    def length(self) -> int:
        """Tokens that it takes in a batch."""
        return len(self.tokens) + (0 if self.condition is None else len(self.condition))


class DocumentReader:
    """Reads documents, keeping the row group that the last one came from."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._firsts = [group.first_document for group in split.row_groups]
        self._held: tuple[int, Documents, Documents | None] | None = None

    def read(self, places: Sequence[int]) -> list[Document]:
        """The documents at these places, in the order given."""
        return [self._one(int(place)) for place in places]

    def _one(self, place: int) -> Document:
        index = int(np.searchsorted(self._firsts, place, side="right")) - 1
        if self._held is None or self._held[0] != index:
            conditional = self._split.is_conditional
            conditions = self._split.read_conditions(index) if conditional else None
            self._held = (index, self._split.read_row_group(index), conditions)
        _, documents, conditions = self._held
        row = place - self._firsts[index]
        return Document(place, documents[row], None if conditions is None else conditions[row])


@dataclass(frozen=True)
class Batch:
    """Documents that are computed together, padded on the right: B documents, T tokens."""

    rows: NDArray[np.int64]  # where in the list that was cut into batches each of them stands
    places: NDArray[np.int64]  # in the split
    # The model's arguments, on its device: input_ids and attention_mask [B, T], and of conditional
    # data `condition`.
    inputs: dict[str, Any]
    num_tokens: int  # positions of one pass over the batch, padding among them

    def read_by(self, model: Della) -> Batch:
        """The same batch, its sources read once for all that is to be computed of it."""
        if "condition" not in self.inputs:
            return self
        condition = model.read(self.inputs["condition"])
        return replace(self, inputs=self.inputs | {"condition": condition})


def make_batch(
    documents: Sequence[Document],
    device: str | torch.device,
    rows: NDArray[np.int64] | None = None,
) -> Batch:
    """Put documents into one batch; what pads is never looked at."""
    from della_model import Condition
    from pipeline.batches import pad_right

    ids, mask = (tensor.to(device) for tensor in pad_right([d.tokens for d in documents], 0))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    num_tokens = ids.numel()
    conditions = [d.condition for d in documents if d.condition is not None]
    if conditions:
        condition = Condition(*(tensor.to(device) for tensor in pad_right(conditions, 0)))
        inputs["condition"] = condition
        num_tokens += condition.input_ids.numel()
    return Batch(
        np.arange(len(documents)) if rows is None else rows,
        np.array([document.place for document in documents]),
        inputs,
        num_tokens,
    )


def make_batches(
    documents: Sequence[Document], batch_tokens: int, device: str | torch.device
) -> Iterator[Batch]:
    """Documents of like length together, as many as the budget holds with padding.

    A document longer than the budget is a batch of its own: it still has to be evaluated.
    """
    from pipeline.batches import cut_sorted

    lengths = np.array([document.length for document in documents], np.int32)
    order = np.argsort(lengths, kind="stable")
    fits = int(np.searchsorted(lengths[order], batch_tokens, side="right"))
    groups = [np.array([single]) for single in order[fits:]]
    if fits:
        groups = np.split(order[:fits], cut_sorted(lengths[order[:fits]], batch_tokens)) + groups
    for rows in groups:
        yield make_batch([documents[row] for row in rows], device, rows)
