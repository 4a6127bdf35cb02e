"""Checkpoints in the storage: which there are, whether one is whole, and which are kept.

Every rank stores its own files and a record of their sizes and checksums; when all have, the first
rank writes `manifest.json`, last of all. A folder without it was never finished. What is read is
compared with it, so that a damaged file is found before anything is built on it.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.artifact import digest
from pipeline.errors import UserError
from pipeline.storage import Location

FORMAT = 2
CHECKPOINTS = "checkpoints"  # the folder in a run's
MANIFEST = "manifest.json"
PARTS = "parts"
_CHUNK_BYTES = 4 << 20
_NAME = re.compile(r"step-(\d{9,})")


class TornCheckpointError(Exception):
    """A checkpoint is not what its manifest says; the text tells what is wrong."""


@dataclass(frozen=True)
class StoredFile:
    """One file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    step: int
    world_size: int
    zero_stage: int
    # The last validation up to this step, in nats; None: there was none.
    negative_elbo: float | None
    files: dict[str, StoredFile]  # by their path in the checkpoint's folder

    def save(self, file: Location) -> None:
        """Write it, with a checksum of itself."""
        record = {"format": FORMAT} | asdict(self)
        file.write_json(record | {"digest": digest(record)})

    @classmethod
    def load(cls, file: Location) -> Manifest:
        """Read it.

        Raises:
            TornCheckpointError: if it is not there or damaged.
            UserError: if it is of another format.
        """
        if not file.is_file():
            raise TornCheckpointError(f"it has no {file.name}: writing it was never finished")
        try:
            record = file.read_json()
            found = record.pop("digest")
            whole = found == digest(record)
        except (UserError, AttributeError, KeyError, TypeError):
            whole = False
        if not whole:
            raise TornCheckpointError(f"its {file.name} is damaged")
        if record.pop("format") != FORMAT:
            raise UserError(
                f"{file} is of another format than {FORMAT}, which this version reads: go on with "
                "the version that began the run, or delete its folder."
            )
        files = {name: StoredFile(**stored) for name, stored in record.pop("files").items()}
        return cls(**record, files=files)


def checkpoint_name(step: int) -> str:
    """The folder's name; names sort as steps do."""
    return f"step-{step:09d}"


def step_of(folder: Location) -> int | None:
    """The step of a checkpoint's folder; None where it is none."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: where they lie, each in a folder of its own.
        keep: how many of the last are kept, beside the one with the best validation.
    """

    def __init__(self, folder: Location, keep: int) -> None:
        self.folder, self._keep = folder, keep

    def __truediv__(self, step: int) -> Location:
        return self.folder / checkpoint_name(step)

    def steps(self) -> list[int]:
        """The steps that have a folder, the newest first, whole or not."""
        found = (step_of(child) for child in self.folder.children())
        return sorted((step for step in found if step is not None), reverse=True)

    def manifest(self, step: int) -> Manifest:
        """Read a checkpoint's manifest and compare the sizes of its files.

        Raises:
            TornCheckpointError: if it is not whole.
        """
        folder = self / step
        manifest = Manifest.load(folder / MANIFEST)
        if manifest.step != step:
            raise TornCheckpointError(f"its {MANIFEST} is that of step {manifest.step}")
        check_sizes(folder, manifest.files)
        return manifest

    def whole_steps(self) -> list[int]:
        """The steps that have a manifest, the newest first."""
        return [step for step in self.steps() if (self / step / MANIFEST).is_file()]

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: they are torn, and will be written again."""
        for later in self.steps():
            if later > step:
                (self / later).delete()

    def prune(self) -> None:
        """Delete all but the last ones and the best."""
        steps = self.whole_steps()
        kept = set(steps[: self._keep])
        kept |= {best} if (best := self.best_step(steps)) is not None else set()
        for step in steps:
            if step not in kept:
                # Without its manifest first, so that a half deleted one is not taken for a whole.
                (self / step / MANIFEST).delete()
                (self / step).delete()

    def best_step(self, steps: list[int]) -> int | None:
        """Of these steps, the first after the validation with the lowest negative ELBO."""
        found: list[tuple[float, int]] = []
        for step in steps:
            try:
                value = Manifest.load(self / step / MANIFEST).negative_elbo
            except TornCheckpointError:
                continue
            if value is not None:
                found.append((value, step))
        return min(found, default=(0.0, None))[1]


def check_sizes(folder: Location, files: Mapping[str, StoredFile]) -> None:
    """Compare what lies in a folder with its manifest, by size.

    Raises:
        TornCheckpointError: naming the first file that is missing or of another size.
    """
    for name, stored in files.items():
        found = (folder / name).info()
        if not found.is_file:
            raise TornCheckpointError(f"its {name} is missing")
        if found.size != stored.bytes:
            raise TornCheckpointError(
                f"its {name} has {found.size:,} bytes instead of {stored.bytes:,}"
            )


def verified(folder: Location, files: Mapping[str, StoredFile], cache: Path) -> Path:
    """Give files of a folder as local ones whose checksums were compared.

    Args:
        folder: where they lie.
        files: which, and what they must be.
        cache: where they are copied to if they lie on a remote storage.

    Raises:
        TornCheckpointError: naming the first that is another.
    """
    for name, stored in files.items():
        copy = None if folder.is_local else cache / name
        if _checksum(folder / name, copy) != stored.sha256:
            raise TornCheckpointError(f"the checksum of its {name} is wrong")
    return Path(folder.path) if folder.is_local else cache


def _checksum(file: Location, copy: Path | None) -> str:
    if copy is None:
        return file.sha256()
    copy.parent.mkdir(parents=True, exist_ok=True)
    found = hashlib.sha256()
    with copy.open("wb") as written:
        for chunk in file.chunks():
            found.update(chunk)
            written.write(chunk)
    return found.hexdigest()


def stored_folder(source: Path, target: Location) -> dict[str, StoredFile]:
    """Copy a local folder's files into the storage; return what they are, by path."""
    files = sorted(file for file in source.rglob("*") if file.is_file())
    names = {str(file.relative_to(source)): file for file in files}
    return {name: stored_file(file, target / name) for name, file in names.items()}


def stored_file(source: Path, target: Location) -> StoredFile:
    """Copy one file, on the way past its checksum; on a local disk it has reached the disk."""
    found = hashlib.sha256()
    target.parent.make_folder()
    with source.open("rb") as file, _opened(target) as written:
        while chunk := file.read(_CHUNK_BYTES):
            found.update(chunk)
            written.write(chunk)
        if target.is_local:
            written.flush()
            os.fsync(written.fileno())
    return StoredFile(source.stat().st_size, found.hexdigest())


def _opened(target: Location) -> Any:
    if target.is_local:
        return Path(target.path).open("wb")
    return target.filesystem.open_output_stream(target.path, compression=None)


def store_part(folder: Location, attempt: str, rank: int, files: Mapping[str, StoredFile]) -> None:
    """Record what a rank has stored of a checkpoint."""
    plain = {name: asdict(stored) for name, stored in files.items()}
    _part(folder, attempt, rank).write_json(plain)


def all_parts(
    folder: Location, attempt: str, world_size: int, may_wait: Callable[[], bool]
) -> dict[str, StoredFile]:
    """Wait for every rank's record; return all files.

    Args:
        folder: the checkpoint's.
        attempt: whose records count; those of an attempt that died do not.
        world_size: how many ranks there are.
        may_wait: asked between two looks.

    Raises:
        TimeoutError: when it may wait no longer.
    """
    files: dict[str, StoredFile] = {}
    for rank in range(world_size):
        part = _part(folder, attempt, rank)
        while not part.is_file():
            if not may_wait():
                raise TimeoutError(f"rank {rank} has not stored its part of {folder}")
            time.sleep(0.05 if folder.is_local else 0.5)
        files |= {name: StoredFile(**stored) for name, stored in part.read_json().items()}
    return files


def _part(folder: Location, attempt: str, rank: int) -> Location:
    return folder / PARTS / f"{attempt}-{rank:05d}.json"
