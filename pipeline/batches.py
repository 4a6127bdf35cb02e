"""The order of batches: a pure function of (seed, epoch, position) over the whole dataset.

Nothing here depends on the number of workers, so a run goes on at the exact next batch, on more or
fewer of them. An epoch is planned from the documents' lengths alone: row groups are permuted and
grouped into windows; within a window documents are shuffled, sorted by length pool by pool, cut
into global batches under a token budget, and the batches are shuffled. Data that fits one window is
shuffled as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.noise import Purpose, generator, torch_seed

Documents = NDArray[np.int64]  # indices into the whole split

# Batches' worth of tokens that are sorted by length together: more pads less, fewer mixes better.
POOL_BATCHES = 64

VALIDATION_EPOCH = 2**32 - 1  # the "epoch" of noise that stays the same all through a run


@dataclass(frozen=True, order=True)
class Position:
    """The next global batch of a run: its epoch, and its place in the epoch's order."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Window:
    """Row groups that are in memory together, and the batches cut from their documents."""

    epoch: int
    first_batch: int  # place of its first batch in the epoch
    row_groups: tuple[int, ...]
    batches: tuple[Documents, ...]  # each sorted by length, shortest first


@dataclass(frozen=True)
class BatchOrder:
    """The global batches of every epoch.

    Args:
        lengths: tokens of each document, in the order of the shards.
        row_group_rows: documents of each row group, in the same order.
        batch_tokens: bound on documents x longest document of a global batch, padding included.
        shuffle_window_tokens: bound on the tokens of one window; a single larger row group is a
            window of its own.
        seed: names the order; 0 or more.
        source_lengths: of conditional data, the tokens of each document's source; the budgets
            count them in.

    Raises:
        UserError: if there is no document, or one is longer than `batch_tokens`.
    """

    lengths: NDArray[np.int32]
    row_group_rows: Sequence[int]
    batch_tokens: int
    shuffle_window_tokens: int
    seed: int
    source_lengths: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        if len(self.lengths) == 0:
            raise UserError("the dataset's split holds no document: there is nothing to train on.")
        if sum(self.row_group_rows) != len(self.lengths):
            raise ValueError(
                f"{len(self.lengths)} lengths for {sum(self.row_group_rows)} rows of row groups"
            )
        longest = int(self.total_lengths.max())
        if longest > self.batch_tokens:
            raise UserError(
                f"the longest document has {longest:,} tokens, but train.batch_tokens="
                f"{self.batch_tokens:,}: it would fit no batch; set train.batch_tokens to at least "
                f"{longest}, or preprocess with corpus.max_tokens={self.batch_tokens}."
            )

    @cached_property
    def total_lengths(self) -> NDArray[np.int32]:
        """Tokens that a document takes in a batch, with its source."""
        return self.lengths if self.source_lengths is None else self.lengths + self.source_lengths

    @cached_property
    def first_documents(self) -> Documents:
        """Index of each row group's first document."""
        return np.concatenate([[0], np.cumsum(self.row_group_rows)[:-1]]).astype(np.int64)

    def num_batches(self, epoch: int) -> int:
        """Count the global batches of an epoch."""
        return sum(len(window.batches) for window in self.windows(epoch))

    def windows(self, epoch: int) -> Iterator[Window]:
        """Plan an epoch, window by window."""
        first_batch = 0
        for index, row_groups in enumerate(self._grouped_row_groups(epoch)):
            batches = self._window_batches(epoch, index, row_groups)
            yield Window(epoch, first_batch, row_groups, tuple(batches))
            first_batch += len(batches)

    def windows_from(self, start: Position) -> Iterator[Window]:
        """Plan without end from a position on; the first window holds only what is left of it."""
        epoch, skip = start.epoch, start.batch
        while True:
            for window in self.windows(epoch):
                done = min(max(skip - window.first_batch, 0), len(window.batches))
                if done < len(window.batches):
                    yield Window(
                        epoch, window.first_batch + done, window.row_groups, window.batches[done:]
                    )
            epoch, skip = epoch + 1, 0

    def batches_from(self, start: Position) -> Iterator[tuple[Position, Documents]]:
        """The global batches from a position on, without end."""
        for window in self.windows_from(start):
            for offset, documents in enumerate(window.batches):
                yield Position(window.epoch, window.first_batch + offset), documents

    def _grouped_row_groups(self, epoch: int) -> list[tuple[int, ...]]:
        tokens = np.add.reduceat(self.total_lengths.astype(np.int64), self.first_documents)
        groups: list[list[int]] = []
        filled = 0
        for row_group in generator(self.seed, Purpose.ROW_GROUPS, epoch).permutation(len(tokens)):
            if not groups or filled + tokens[row_group] > self.shuffle_window_tokens:
                groups.append([])
                filled = 0
            groups[-1].append(int(row_group))
            filled += int(tokens[row_group])
        return [tuple(group) for group in groups]

    def _window_batches(
        self, epoch: int, index: int, row_groups: tuple[int, ...]
    ) -> list[Documents]:
        random = generator(self.seed, Purpose.WINDOW, epoch, index)
        starts, rows = self.first_documents, self.row_group_rows
        documents = np.concatenate([np.arange(starts[g], starts[g] + rows[g]) for g in row_groups])
        documents = random.permutation(documents)
        batches = self._cut_pools(documents)
        return [batches[i] for i in random.permutation(len(batches))]

    def _cut_pools(self, documents: Documents) -> list[Documents]:
        """Sort by length within pools and cut; what is left of one pool goes into the next."""
        pool_of = np.cumsum(self.total_lengths[documents], dtype=np.int64)
        pool_of //= POOL_BATCHES * self.batch_tokens
        *pools, last = np.split(documents, np.flatnonzero(np.diff(pool_of)) + 1)
        batches: list[Documents] = []
        rest = documents[:0]
        for pool in pools:
            pool = self._sorted(np.concatenate([rest, pool]))
            *full, rest = np.split(pool, cut_sorted(self.total_lengths[pool], self.batch_tokens))
            batches += full
        last = self._sorted(np.concatenate([rest, last]))
        return [*batches, *np.split(last, cut_evenly(self.total_lengths[last], self.batch_tokens))]

    def _sorted(self, documents: Documents) -> Documents:
        return documents[np.argsort(self.total_lengths[documents], kind="stable")]


def cut_sorted(lengths: NDArray[np.int32], batch_tokens: int) -> list[int]:
    """Where to cut ascending lengths so that each piece x its longest fits `batch_tokens`.

    Greedy: each piece but the last takes all it can hold.
    """
    cuts: list[int] = []
    start = 0
    while True:
        most = batch_tokens // int(lengths[start])  # no piece from here on holds more
        ahead = lengths[start : start + most].astype(np.int64)
        padded = np.arange(1, len(ahead) + 1) * ahead  # ascending
        start += int(np.searchsorted(padded, batch_tokens, side="right"))
        if start >= len(lengths):
            return cuts
        cuts.append(start)


def cut_evenly(lengths: NDArray[np.int32], batch_tokens: int) -> list[int]:
    """Cut as `cut_sorted`, into as few pieces, but without a small one left over at the end.

    A leftover of one document would move the weights as far as a whole batch does.
    """
    cuts = cut_sorted(lengths, batch_tokens)
    low, high = int(lengths[-1]), batch_tokens  # the smallest budget that needs no more pieces
    while low < high:
        middle = (low + high) // 2
        tried = cut_sorted(lengths, middle)
        if len(tried) > len(cuts):
            low = middle + 1
        else:
            high, cuts = middle, tried
    return cuts


def accumulation_steps(batch_tokens: int, micro_batch_tokens: int, num_workers: int) -> int:
    """Forwards per worker and optimizer step, the same all through a run."""
    return math.ceil(batch_tokens / (num_workers * micro_batch_tokens))


def split(documents: Documents, num_workers: int, accumulation: int) -> list[list[Documents]]:
    """Deal a global batch to `[rank][micro]`, round-robin over the list sorted by length.

    Each part holds at most one document more than another; a part may be empty.
    """
    parts = num_workers * accumulation
    return [
        [documents[micro * num_workers + rank :: parts] for micro in range(accumulation)]
        for rank in range(num_workers)
    ]


def dropout_seed(seed: int, step: int, part: int) -> int:
    """The torch seed of one forward: set before it, no random state needs to be saved.

    Args:
        seed: the run's.
        step: of the optimizer.
        part: which part of the global batch it is, as `split` deals them. The same number of parts
            on more or fewer workers are the same parts, and draw the same dropout.
    """
    return torch_seed(seed, Purpose.DROPOUT, step, part)


@dataclass(frozen=True)
class MicroBatch:
    """Padded documents of one forward on one worker: B documents, T tokens, L x p latents."""

    input_ids: torch.Tensor  # int64 [B, T]
    attention_mask: torch.Tensor  # int64 [B, T], 1 on tokens
    noise: torch.Tensor  # float32 [B, L, p]
    document_weight: torch.Tensor  # float32 [B]; 0 on a filler
    # Of conditional data: the sources, S tokens, padded on their own.
    condition_ids: torch.Tensor | None = None  # int64 [B, S]
    condition_mask: torch.Tensor | None = None  # int64 [B, S], 1 on tokens
    # Under word dropout: what the decoder reads in place of `input_ids`.
    decoder_input_ids: torch.Tensor | None = None  # int64 [B, T]

    def arguments(self, device: torch.device) -> dict[str, torch.Tensor]:
        """What there is of it, on a device, by the names of the objective's arguments."""
        given = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {n: t.to(device, non_blocking=True) for n, t in given if t is not None}


def padded(
    tokens: Sequence[NDArray[np.int32]],
    noise: NDArray[np.float32],
    weight: float,
    pad_id: int,
    conditions: Sequence[NDArray[np.int32]] | None = None,
) -> MicroBatch:
    """Pad documents on the right to their longest; each weighs `weight` in the loss."""
    input_ids, mask = pad_right(tokens, pad_id)
    return MicroBatch(
        input_ids,
        mask,
        torch.from_numpy(noise),
        torch.full((len(tokens),), weight, dtype=torch.float32),
        *((None, None) if conditions is None else pad_right(conditions, pad_id)),
    )


def pad_right(
    tokens: Sequence[NDArray[np.int32]], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and a mask that is 1 on them, both int64 [B, T]."""
    lengths = np.array([len(document) for document in tokens])
    input_ids = np.full((len(tokens), lengths.max()), pad_id, np.int64)
    mask = np.arange(lengths.max()) < lengths[:, None]
    input_ids[mask] = np.concatenate(tokens)
    return torch.from_numpy(input_ids), torch.from_numpy(mask.astype(np.int64))
