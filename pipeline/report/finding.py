"""From what a user names as a run to the evaluation of its weights."""

from __future__ import annotations

from pipeline.artifact import Artifact
from pipeline.errors import UserError
from pipeline.storage import Location


def evaluation_of(folder: Location) -> Location:
    """An evaluation's folder for itself; for a training's, the newest evaluation of its weights.

    Evaluations are looked for beside the training, where the jobs put them.

    Raises:
        UserError: if the folder holds neither, or the training was not evaluated.
    """
    artifact = Artifact.load(folder)
    if artifact.stage != "train":
        return folder
    beside = folder.parent.parent / "evaluate"
    candidates = [Artifact.find(child) for child in beside.children()] if beside.exists() else []
    found = [
        one
        for one in candidates
        if one is not None and one.status == "done" and _is_of(one, artifact)
    ]
    if not found:
        raise UserError(
            f"runs holds {folder}, a training without an evaluation beside it in {beside}: its "
            f"figures are what is compared; run jobs/evaluate.py weights={folder} first."
        )
    return max(found, key=lambda one: one.started_at).folder


def _is_of(evaluation: Artifact, training: Artifact) -> bool:
    return evaluation.inputs.get("weights") == training.fingerprint
