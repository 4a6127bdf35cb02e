"""Standard normal noise as a pure function of (seed, document): of no worker, batch or order."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Stream(IntEnum):
    """What noise is drawn for. Streams of one seed are independent of each other."""

    LIKELIHOOD = 0
    PRIOR = 1
    RECONSTRUCTION = 2
    TOKENS = 3


_EVALUATION = 0x45564C  # keeps these streams apart from the training's of the same seed


def document_noise(
    seed: int, stream: Stream, documents: Iterable[int], shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """Noise ~ N(0, I) of `shape` for each document, [documents, *shape].

    More draws along the first axis of `shape` leave the earlier ones as they are.

    Args:
        seed: names all streams; 0 or more.
        stream: what the noise is for.
        documents: places of the documents in their split.
        shape: of one document's noise.
    """
    key = np.random.SeedSequence((seed, _EVALUATION, stream)).generate_state(2, np.uint64)

    def draw(document: int) -> NDArray[np.float32]:
        # The counter's low words count draws, its high ones documents: none are shared.
        bits = np.random.Philox(key=key, counter=[0, 0, document, 0])
        return np.random.Generator(bits).standard_normal(shape, dtype=np.float32)

    return np.stack([draw(int(document)) for document in documents])


def torch_seed(seed: int, stream: Stream, index: int) -> int:
    """A seed for torch's own generators."""
    state = np.random.SeedSequence((seed, _EVALUATION, stream, index)).generate_state(1, np.uint64)
    return int(state[0] >> 1)
