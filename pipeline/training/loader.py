"""Documents from shards to micro-batches, read and padded in the background.

Only the row groups of the current window are in memory, and of the next one, which is read while
the current one is used.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.batches import (
    VALIDATION_EPOCH,
    BatchOrder,
    Documents,
    MicroBatch,
    Position,
    Window,
    cut_sorted,
    padded,
    split,
)
from pipeline.noise import Purpose, Stream, document_noise, document_uniforms
from pipeline.shards import Split

PREFETCH_STEPS = 4


@dataclass(frozen=True)
class Share:
    """Which part of each global batch this worker takes."""

    rank: int
    num_workers: int
    accumulation: int


@dataclass(frozen=True)
class Padding:
    """What a micro-batch needs beside the documents."""

    pad_id: int
    num_layers: int  # L, the latents of a document
    latent_size: int  # p
    seed: int
    word_dropout: float = 0.0  # share of the decoder's inputs that are hidden in training


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step's share of this worker."""

    position: Position
    next_position: Position
    micro_batches: tuple[MicroBatch, ...]
    num_documents: int  # of the global batch
    num_tokens: int  # that the global batch predicts: all but padding, BOS and sources


class TrainLoader:
    """Steps from a position on, without end; `close` when done.

    `waited_s` is the time in seconds that the consumer has waited for data so far.

    Raises:
        UserError: what reading a shard raises is raised again where the step is asked for.
    """

    def __init__(
        self, split: Split, order: BatchOrder, start: Position, share: Share, padding: Padding
    ) -> None:
        self._split, self._order, self._start = split, order, start
        self._share, self._padding = share, padding
        self.waited_s = 0.0
        self._queue: queue.Queue[StepBatch | BaseException] = queue.Queue(PREFETCH_STEPS)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True, name="train-loader")
        self._thread.start()

    def next(self) -> StepBatch:
        """The next step's share."""
        started = time.perf_counter()
        item = self._queue.get()
        self.waited_s += time.perf_counter() - started
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop reading."""
        self._stopped.set()
        self._thread.join()

    def _fill(self) -> None:
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="window") as reader:
                for window, tokens_of in self._windows(reader):
                    for step in self._steps(window, tokens_of):
                        if not self._put(step):
                            return
        except BaseException as error:
            self._put(error)

    def _put(self, item: StepBatch | BaseException) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _windows(self, reader: ThreadPoolExecutor) -> Iterator[tuple[Window, TokensOf]]:
        """Each window with its documents in memory; the next one is read meanwhile."""
        windows = self._order.windows_from(self._start)
        window = next(windows)
        reading: Future[TokensOf] = reader.submit(read_window, self._split, self._order, window)
        for upcoming in windows:
            tokens_of = reading.result()
            reading = reader.submit(read_window, self._split, self._order, upcoming)
            yield window, tokens_of
            window = upcoming

    def _steps(self, window: Window, tokens_of: TokensOf) -> Iterator[StepBatch]:
        share = self._share
        for offset, documents in enumerate(window.batches):
            batch = window.first_batch + offset
            parts = split(documents, share.num_workers, share.accumulation)[share.rank]
            # The mean over workers and DeepSpeed's 1/accumulation then give sum / documents.
            weight = share.num_workers * share.accumulation / len(documents)
            yield StepBatch(
                Position(window.epoch, batch),
                Position(window.epoch, batch + 1),
                tuple(
                    self._micro_batch(part, window.epoch, tokens_of, weight)
                    if len(part)
                    else self._micro_batch(documents[:1], window.epoch, tokens_of, 0.0)
                    for part in parts
                ),
                len(documents),
                int(self._order.lengths[documents].sum()) - len(documents),
            )

    def _micro_batch(
        self, documents: Documents, epoch: int, tokens_of: TokensOf, weight: float
    ) -> MicroBatch:
        return make_micro_batch(documents, epoch, tokens_of, weight, self._padding)


class Tokens(NamedTuple):
    """A document's token ids, and its source's where the data is conditional."""

    document: NDArray[np.int32]
    condition: NDArray[np.int32] | None


TokensOf = Callable[[int], Tokens]


def make_micro_batch(
    documents: Documents, epoch: int, tokens_of: TokensOf, weight: float, padding: Padding
) -> MicroBatch:
    """Pad documents, with the noise that belongs to them in this epoch."""
    stream = Stream(padding.seed, Purpose.TRAINING, epoch)
    noise = document_noise(stream, documents, (padding.num_layers, padding.latent_size))
    tokens = [tokens_of(int(d)) for d in documents]
    conditions = [t.condition for t in tokens if t.condition is not None]
    batch = padded([t.document for t in tokens], noise, weight, padding.pad_id, conditions or None)
    if padding.word_dropout == 0 or epoch == VALIDATION_EPOCH:
        return batch
    hidden = dropped_words(padding, epoch, documents, batch.input_ids.shape[1])
    return replace(batch, decoder_input_ids=batch.input_ids.masked_fill(hidden, padding.pad_id))


def dropped_words(
    padding: Padding, epoch: int, documents: Documents, num_tokens: int
) -> torch.Tensor:
    """Which of the decoder's inputs are hidden, [documents, tokens]; never the first, BOS.

    A pure function of seed, epoch and document: of no worker, and no document beside it.
    """
    stream = Stream(padding.seed, Purpose.WORD_DROPOUT, epoch)
    hidden = document_uniforms(stream, documents, num_tokens) < padding.word_dropout
    hidden[:, 0] = False
    return torch.from_numpy(hidden)


def read_window(split: Split, order: BatchOrder, window: Window) -> TokensOf:
    """Read a window's row groups; return the tokens of a document by its index."""
    return read_row_groups(split, order.first_documents, window.row_groups)


def read_row_groups(split: Split, first: Documents, row_groups: Sequence[int]) -> TokensOf:
    """Read row groups; return the tokens of a document by its index in the split."""
    held = {index: split.read_row_group(index) for index in row_groups}
    conditions = {
        index: split.read_conditions(index) for index in row_groups if split.is_conditional
    }

    def tokens_of(document: int) -> Tokens:
        row_group = int(np.searchsorted(first, document, side="right")) - 1
        row = document - int(first[row_group])
        condition = conditions[row_group][row] if row_group in conditions else None
        return Tokens(held[row_group][row], condition)

    return tokens_of


def validation_batches(
    split: Split, num_documents: int, micro_batch_tokens: int, share: Share, padding: Padding
) -> list[MicroBatch]:
    """This worker's share of the split's first documents, the same every time it is called.

    Every worker gets as many batches as the others (ZeRO-3 computes them together): the shorter
    lists are filled with a document of weight 0.
    """
    lengths = (split.lengths() + split.condition_lengths())[:num_documents]
    first = np.array([group[2] for group in split.row_groups], np.int64)
    needed = [i for i, start in enumerate(first) if start < len(lengths)]
    tokens_of = read_row_groups(split, first, needed)
    documents = np.argsort(lengths, kind="stable").astype(np.int64)
    budget = max(micro_batch_tokens, int(lengths.max()))
    batches = np.split(documents, cut_sorted(lengths[documents], budget))
    mine = [(batch, 1.0) for batch in batches[share.rank :: share.num_workers]]
    rounds = -(-len(batches) // share.num_workers)
    mine += [(documents[:1], 0.0)] * (rounds - len(mine))
    return [
        make_micro_batch(batch, VALIDATION_EPOCH, tokens_of, weight, padding)
        for batch, weight in mine
    ]
