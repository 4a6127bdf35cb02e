"""Which checkpoint is meant: a checkpoint's folder, or a run's last or best. Without torch."""

from __future__ import annotations

from typing import Any, Literal

from pipeline.artifact import Artifact, digest
from pipeline.errors import UserError
from pipeline.storage import Location

STATE = "state.json"  # as pipeline.training.checkpoint writes it
RUNS = "checkpoints"  # of a train artifact


def find_checkpoint(folder: Location, which: Literal["last", "best"] = "last") -> Location:
    """The checkpoint that `checkpoint=FOLDER` means.

    A train artifact, finished or not, means one of its checkpoints; so does its `checkpoints/`.

    Raises:
        UserError: if there is none, or not the best any more.
    """
    if (folder / STATE).is_file():
        return folder
    artifact = Artifact.find(folder)
    if artifact is not None and artifact.stage != "train":
        raise UserError(
            f"checkpoint={folder} is the artifact of the stage {artifact.stage}: expected a "
            "checkpoint or the artifact of train, which alone writes them."
        )
    parent = folder / RUNS if artifact is not None else folder
    found = [child for child in parent.children() if (child / STATE).is_file()]
    if not found:
        raise UserError(
            f"checkpoint={folder} holds no checkpoint ({STATE} is missing): expected a folder "
            f"{RUNS}/step-… that training wrote, or its artifact with one; check the path, or train"
            " to the first checkpoint (train.checkpoint_every)."
        )
    last = max(found, key=lambda checkpoint: int(read_state(checkpoint)["state"]["step"]))
    return last if which == "last" else _best(last, found)


def _best(last: Location, found: list[Location]) -> Location:
    best = read_state(last)["state"].get("best")
    step = None if best is None else best["step"]
    for checkpoint in found:
        if step is not None and read_state(checkpoint)["state"]["step"] == step:
            return checkpoint
    steps = ", ".join(str(read_state(checkpoint)["state"]["step"]) for checkpoint in found)
    why = "nothing was validated" if step is None else f"the best step, {step}, was not kept"
    raise UserError(
        f"which=best has no checkpoint here ({why}; there are those of {steps}): give which=last, "
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
    """Name a checkpoint by its record and its files' names and sizes; no file is read for it.

    The record holds the run's settings, its step and the time that it took.

    Raises:
        UserError: if its record is damaged.
    """
    prefix = checkpoint.path.rstrip("/") + "/"
    files = {
        file.path.removeprefix(prefix): file.info().size or 0
        for file in checkpoint.children(recursive=True)
    }
    return digest({"state": str(read_state(checkpoint)), "files": files})
