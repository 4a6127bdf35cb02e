"""A model's weights out of a DeepSpeed checkpoint of any ZeRO stage, one at a time, in float32.

DeepSpeed's own `zero_to_fp32` does this for stages 1 to 3 with all tensors in memory at once, and
runs whatever code the files name. Here no process group, no GPU and no DeepSpeed is needed.

What lies where. `*_model_states.pt`: names, shapes and buffers, at stages 0 to 2 the parameters in
the precision that the model computes in too. `*_optim_states.pt`, one a rank: the float32 masters
of what is trained. Stages 1 and 2 lay a group's parameters end to end and cut that line in as many
pieces as there are ranks; stage 3 cuts each parameter. Stage 0 is read as the model computes
with it, which is what a run of that stage exports too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.training.safe_reading import read_tensors

# Mapped bytes count as held once they were read: after so many the files are mapped anew.
_MAPPED_BYTES = 64 << 20
_OPTIMIZER = "optimizer_state_dict"
_PARTITIONS = ("single_partition_of_fp32_groups", "fp32_flat_groups")  # stages 1 and 2; stage 3


@dataclass(frozen=True)
class _Piece:
    """A run of numbers in a tensor of one of the files."""

    file: int
    keys: tuple[str | int, ...]  # the way to the tensor from the file's top
    start: int = 0
    stop: int | None = None  # None: all of it


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies: pieces that follow each other, and perhaps padding at the end."""

    shape: tuple[int, ...]
    pieces: tuple[_Piece, ...]


class CheckpointTensors:
    """The tensors of a checkpoint by name.

    Args:
        folder: with DeepSpeed's files.

    Raises:
        UserError: if files are missing, damaged, or name code.
    """

    def __init__(self, folder: Path) -> None:
        models = _in_order(folder, "*_model_states.pt")
        optimizers = _in_order(folder, "*_optim_states.pt")
        if not models:
            raise UserError(
                f"{folder} holds no *_model_states.pt: expected a checkpoint that training wrote; "
                "it is torn or another folder: give an earlier checkpoint."
            )
        self._files = [*models, *optimizers]
        self._open: dict[int, dict[str, Any]] = {}
        self._mapped = 0
        first = self._content(0)
        self.buffer_names: list[str] = list(first["buffer_names"] or ())
        self._places = dict(self._find(first, len(models), len(optimizers)))
        for alias, name in (first.get("shared_params") or {}).items():
            if name in self._places:
                self._places[alias] = self._places[name]  # not the copy beside the module

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> torch.Tensor:
        """One tensor whole, floating point as float32.

        Raises:
            UserError: if the checkpoint has none of that name.
        """
        if name not in self._places:
            raise UserError(
                f"{self._files[0].parent} has no parameter '{name}', which the model that it "
                "describes has: the two do not belong together; give another checkpoint."
            )
        place = self._places[name]
        parts = [self._piece(piece) for piece in place.pieces]
        whole = torch.cat(parts)  # a copy, also of a single part
        count = math.prod(place.shape)
        if whole.numel() > count:  # without the padding, and without keeping it
            whole = whole[:count].clone()
        if whole.is_floating_point():
            whole = whole.float()
        del parts
        self._mapped += whole.nbytes
        if self._mapped >= _MAPPED_BYTES:
            self._open.clear()
            self._mapped = 0
        return whole.reshape(place.shape)

    def _piece(self, piece: _Piece) -> torch.Tensor:
        value: Any = self._content(piece.file)
        for key in piece.keys:
            value = value[key]
        found: torch.Tensor = value.detach().reshape(-1)[piece.start : piece.stop]
        return found

    def _content(self, file: int) -> dict[str, Any]:
        if file not in self._open:
            self._open[file] = read_tensors(self._files[file])
        return self._open[file]

    def _find(
        self, first: dict[str, Any], num_models: int, num_optimizers: int
    ) -> Iterator[tuple[str, _Place]]:
        """Where each parameter and buffer lies; the last place that comes for a name is the one."""
        for name, tensor in (first["module"] or {}).items():
            yield name, _Place(tuple(tensor.shape), (_Piece(0, ("module", name)),))
        for name, shape in (first.get("frozen_param_shapes") or {}).items():
            # At stages 1 and 2 every rank has all of it, at stage 3 its share.
            pieces = tuple(_Piece(i, ("frozen_param_fragments", name)) for i in range(num_models))
            yield name, _Place(tuple(shape), pieces)
        if not num_optimizers:
            return
        ranks = range(num_models, num_models + num_optimizers)
        state = self._content(num_models)[_OPTIMIZER]
        key = next((key for key in _PARTITIONS if key in state), None)
        if key is None:
            raise UserError(
                f"{self._files[num_models]} holds no float32 weights ({' or '.join(_PARTITIONS)}):"
                " it was written by another version of DeepSpeed; export with that version."
            )
        self._require_all_ranks(state, num_optimizers)
        lines = [self._lines(rank, key) for rank in ranks]
        if key == _PARTITIONS[0]:
            paddings = state.get("param_alignment_paddings")
            for group, shapes in enumerate(first["param_shapes"]):
                line = [piece for rank in lines for piece in rank[group : group + 1]]
                yield from _in_a_line(shapes, line, paddings[group] if paddings else None)
        else:
            shapes = {n: s for group in first["param_shapes"] for n, s in group.items()}
            yield from _cut_each(shapes, lines)

    def _lines(self, rank: int, key: str) -> list[_Piece]:
        """All of each flat tensor of a rank."""
        tensors = self._content(rank)[_OPTIMIZER][key]
        return [
            _Piece(rank, (_OPTIMIZER, key, index), 0, tensor.numel())
            for index, tensor in enumerate(tensors)
        ]

    def _require_all_ranks(self, state: dict[str, Any], found: int) -> None:
        count = state.get("partition_count", found)
        expected = max(count) if isinstance(count, list | tuple) else count
        if expected != found:
            raise UserError(
                f"{self._files[0].parent} holds *_optim_states.pt of {found} ranks, but {expected} "
                "wrote it: a part of the weights is missing; give another checkpoint."
            )


def _in_order(folder: Path, pattern: str) -> list[Path]:
    """Files by the numbers in their names: rank 10 comes after rank 9."""
    files = folder.glob(pattern)
    return sorted(files, key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)])


def _in_a_line(
    shapes: dict[str, Sequence[int]], line: list[_Piece], paddings: Sequence[int] | None
) -> Iterator[tuple[str, _Place]]:
    """Stages 1 and 2: parameters end to end, the line cut among the ranks."""
    offset = 0
    for index, (name, shape) in enumerate(shapes.items()):
        count = math.prod(shape)
        yield name, _Place(tuple(shape), tuple(_between(line, offset, offset + count)))
        offset += count + (paddings[index] if paddings is not None else 0)


def _cut_each(
    shapes: dict[str, Sequence[int]], lines: list[list[_Piece]]
) -> Iterator[tuple[str, _Place]]:
    """Stage 3: every rank has an equal share of each parameter, the last one's padded."""
    offset = 0
    for name, shape in shapes.items():
        share = -(-math.prod(shape) // len(lines))
        pieces = (p for line in lines for p in _between(line, offset, offset + share))
        yield name, _Place(tuple(shape), tuple(pieces))
        offset += share


def _between(line: list[_Piece], start: int, stop: int) -> Iterator[_Piece]:
    """The pieces of a line from one position to another."""
    begin = 0
    for piece in line:
        assert piece.stop is not None
        end = begin + piece.stop
        if begin < stop and start < end:
            yield _Piece(
                piece.file, piece.keys, max(start - begin, 0), min(stop - begin, piece.stop)
            )
        begin = end
