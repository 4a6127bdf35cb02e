"""Which checkpoint is meant: a checkpoint's folder, or a run's last or best. Without torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

from pipeline.artifact import Artifact, digest
from pipeline.errors import UserError
from pipeline.storage import Location
from pipeline.training.store import (
    CHECKPOINTS,
    MANIFEST,
    CheckpointStore,
    Manifest,
    TornCheckpointError,
    check_sizes,
)

STATE = "state.json"  # as pipeline.training.checkpoint writes it


def find_checkpoint(folder: Location, which: Literal["last", "best"] = "last") -> Location:
    """The checkpoint that `checkpoint=FOLDER` means.

    A train artifact, finished or not, means one of its checkpoints; so does its `checkpoints/`.

    Raises:
        UserError: if there is none, or not the best any more.
    """
    if (folder / MANIFEST).is_file() or (folder / STATE).is_file():
        return folder
    artifact = Artifact.find(folder)
    if artifact is not None and artifact.stage != "train":
        raise UserError(
            f"checkpoint={folder} is the artifact of the stage {artifact.stage}: expected a "
            "checkpoint or the artifact of train, which alone writes them."
        )
    store = CheckpointStore(folder / CHECKPOINTS if artifact is not None else folder, keep=1)
    steps = store.whole_steps()
    if not steps:
        raise UserError(
            f"checkpoint={folder} holds no checkpoint ({MANIFEST} is missing): expected a folder "
            f"{CHECKPOINTS}/step-… that training wrote, or its artifact with one; check the path, "
            "or train to the first checkpoint (train.checkpoint_every)."
        )
    return store / (steps[0] if which == "last" else _best(store, steps))


def _best(store: CheckpointStore, steps: list[int]) -> int:
    """The step of the best validation, if its checkpoint is there."""
    best = read_state(store / steps[0])["state"].get("best")
    if best is not None and best["step"] in steps:
        return int(best["step"])
    kept = ", ".join(str(step) for step in steps)
    why = (
        "nothing was validated"
        if best is None
        else f"no checkpoint of the best step, {best['step']}, was kept"
    )
    raise UserError(
        f"which=best has no checkpoint here ({why}; there are those of {kept}): give which=last, "
        "or take the run's weights/best, which training wrote at that validation."
    )


def read_state(checkpoint: Location) -> dict[str, Any]:
    """The record of a checkpoint.

    Raises:
        UserError: if it is damaged.
    """
    record = (checkpoint / STATE).read_json()
    if not isinstance(record, dict) or "step" not in record.get("state", {}):
        raise UserError(
            f"{checkpoint / STATE} is no record of a checkpoint: it was damaged; give another "
            "checkpoint."
        )
    return record


def fingerprint_checkpoint(checkpoint: Location) -> str:
    """Name a checkpoint by the checksums of its files, as its manifest has them.

    Raises:
        UserError: if it is torn.
    """
    return digest({name: asdict(file) for name, file in read_manifest(checkpoint).files.items()})


def read_manifest(checkpoint: Location) -> Manifest:
    """The manifest of a checkpoint, all of whose files are there in their sizes.

    Raises:
        UserError: if it is torn.
    """
    with torn_explained(checkpoint):
        manifest = Manifest.load(checkpoint / MANIFEST)
        check_sizes(checkpoint, manifest.files)
    return manifest


@contextmanager
def torn_explained(checkpoint: Location) -> Iterator[None]:
    """While the body runs, a torn checkpoint is a user's error, in one sentence."""
    try:
        yield
    except TornCheckpointError as error:
        raise UserError(
            f"{checkpoint} is torn ({error}): weights made of it would be wrong; give an earlier "
            "checkpoint."
        ) from None
