"""The pieces that an evaluation is cut into, each of which one worker does at a time.

A piece depends on nothing but the spec and the split, so that an interrupted evaluation goes on
from its finished pieces with other workers or batches.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.storage import Location

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Block:
    """Items `start` to `stop` (not included) of one measurement: documents, draws or texts."""

    measurement: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many items these are."""
        return self.stop - self.start

    @property
    def file_name(self) -> str:
        """Where its result is kept until all blocks are done."""
        return f"{self.measurement}-{self.start:09d}.npz"


def cut_blocks(measurement: str, count: int, size: int) -> list[Block]:
    """Cut `count` items into blocks of `size`; the last may be smaller."""
    return [Block(measurement, start, min(start + size, count)) for start in range(0, count, size)]


def spread_places(count: int, num_documents: int) -> list[int]:
    """At most `count` documents, evenly spread over all of them."""
    count = min(count, num_documents)
    return [i * num_documents // count for i in range(count)]


def joined(parts: Sequence[Arrays]) -> Arrays:
    """The results of one measurement's blocks, in their order, as one."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def save_arrays(arrays: Mapping[str, NDArray[Any]], file: Location) -> None:
    """Write a block's result, atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    file.write_bytes(buffer.getvalue())


def load_arrays(file: Location) -> Arrays:
    """Read what `save_arrays` wrote.

    Raises:
        UserError: if the file is damaged.
    """
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{file} should hold a finished block of an evaluation but cannot be read "
            f"({error}): it was damaged; delete it, and the same command computes it again."
        ) from None
