"""Random numbers as a pure function of what they are for: of no worker, batch or order.

A `Stream` is named by a seed and a purpose; within it each document has numbers of its own, and
each of a document's draws too. So a document's noise is the same on one worker and on a hundred,
and the hundredth draw is the same whether one draw is made or a thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """What numbers are drawn for; streams of two purposes share nothing."""

    ROW_GROUPS = 0  # the order of a training epoch
    WINDOW = 1
    TRAINING = 2  # latents of a training step
    DROPOUT = 3
    LIKELIHOOD = 4  # latents of an evaluation's importance samples
    PRIOR = 5
    RECONSTRUCTION = 6
    TOKENS = 7  # of a text that is drawn
    START = 8  # weights of the parts that a pretrained backbone lacks
    WORD_DROPOUT = 9  # tokens that a training step hides from the decoder


@dataclass(frozen=True)
class Stream:
    """Names a stream of random numbers; whole numbers of 0 or more."""

    seed: int
    purpose: Purpose
    epoch: int = 0

    @property
    def key(self) -> NDArray[Any]:
        """The key of the counter-based generator that gives the stream's numbers."""
        return np.random.SeedSequence((self.seed, int(self.purpose), self.epoch)).generate_state(
            2, np.uint64
        )


def document_noise(
    stream: Stream, documents: Iterable[int], shape: tuple[int, ...], draw: int = 0
) -> NDArray[np.float32]:
    """Noise ~ N(0, I) of `shape` for each document, [documents, *shape].

    Args:
        stream: what the noise is for.
        documents: places of the documents in their split.
        shape: of one document's noise.
        draw: which of the document's independent draws.
    """
    return _of_documents(
        stream,
        documents,
        draw,
        np.float32,
        shape,
        lambda random, out: random.standard_normal(dtype=np.float32, out=out),
    )


def document_uniforms(
    stream: Stream, documents: Iterable[int], count: int, draw: int = 0
) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) for each document, [documents, count]; as `document_noise`."""
    return _of_documents(
        stream, documents, draw, np.float64, (count,), lambda random, out: random.random(out=out)
    )


def _of_documents(
    stream: Stream,
    documents: Iterable[int],
    draw: int,
    dtype: type[Any],
    shape: tuple[int, ...],
    fill: Callable[[np.random.Generator, NDArray[Any]], Any],
) -> NDArray[Any]:
    places = [int(document) for document in documents]
    found = np.empty((len(places), *shape), dtype)
    bits = np.random.Philox(key=stream.key)
    random, state = np.random.Generator(bits), bits.state
    for row, place in zip(found, places, strict=True):
        # The counter's lowest word counts numbers, the next two draws and documents: none are
        # shared. Setting the state costs half of what a new generator would.
        state["state"]["counter"][:] = (0, draw, place, 0)
        bits.state = state
        fill(random, row)
    return found


def generator(*key: int) -> np.random.Generator:
    """A generator that is a pure function of its key, whole numbers of 0 or more."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def torch_seed(*key: int) -> int:
    """A seed for torch's own generators, a pure function of its key."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return int(state[0] >> 1)
