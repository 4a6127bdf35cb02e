"""Checkpoints on their way from a worker's scratch folder to the storage, beside training."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from pipeline.training.disk import full_disk_explained
from pipeline.training.store import MANIFEST, CheckpointStore, Manifest, all_parts, store_part
from pipeline.training.store import stored_folder as store_folder


class Uploader:
    """Stores this rank's part of one checkpoint after another, in a thread of its own.

    At most one is under way: the next waits for it, so that scratch space stays bounded. The first
    rank also commits a checkpoint when all parts are there, and deletes old ones.

    Args:
        store: where checkpoints go.
        rank: this worker's.
        world_size: how many there are.
        attempt: names this start of the workers, the same on all of them.
        committed: the step of the last checkpoint that is whole; 0: there is none.
    """

    def __init__(
        self, store: CheckpointStore, rank: int, world_size: int, attempt: str, committed: int
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._attempt = attempt
        self.committed = committed
        self._closing = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None

    def submit(self, scratch: Path, manifest: Manifest) -> None:
        """Take over a scratch folder, which is deleted when its files are stored.

        Args:
            scratch: this rank's files, as they are to lie in the checkpoint's folder.
            manifest: the checkpoint's, without files.

        Raises:
            UserError: if the one before could not be stored because a disk is full.
        """
        self.wait()
        self._under_way = self._thread.submit(self._store_part, scratch, manifest)

    def wait(self) -> None:
        """Wait until all that was submitted is stored, and on the first rank committed.

        Raises:
            UserError: if a disk is full.
        """
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def check(self) -> None:
        """Raise what went wrong so far; does not wait."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def close(self) -> None:
        """Give up what is under way."""
        self._closing.set()
        self._thread.shutdown(wait=True)

    def _store_part(self, scratch: Path, manifest: Manifest) -> None:
        folder = self._store / manifest.step
        try:
            with full_disk_explained(self._store.folder, lambda: self.kept):
                store_part(folder, self._attempt, self._rank, store_folder(scratch, folder))
                if self._rank == 0:
                    self._commit(manifest)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _commit(self, manifest: Manifest) -> None:
        folder = self._store / manifest.step
        files = all_parts(
            folder, self._attempt, self._world_size, lambda: not self._closing.is_set()
        )
        replace(manifest, files=files).save(folder / MANIFEST)
        self.committed = manifest.step
        self._store.prune()

    @property
    def kept(self) -> str:
        """What a run that stops here leaves, for a sentence."""
        if not self.committed:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self._store / self.committed}"
