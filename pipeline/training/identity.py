"""What a run is, written beside its checkpoints, so that nothing else goes on from them."""

from __future__ import annotations

from typing import Any

from pipeline.artifact import Artifact, digest, flatten, versions
from pipeline.errors import UserError
from pipeline.external import fingerprints
from pipeline.shards import MANIFEST
from pipeline.specs import TrainSpec
from pipeline.storage import Location
from pipeline.training.store import CHECKPOINTS, CheckpointStore

FILE_NAME = "run.json"
# Of what is recorded, what changes the numbers that a step computes.
_VERSIONS = ("code", "torch", "transformers", "deepspeed")
_SHOWN = 60  # characters of a value


def claim_run(spec: TrainSpec, dataset: Location, output: Location) -> None:
    """Record whose run lies in `output`; where there is one to go on with, check that it is ours.

    Raises:
        UserError: if it has other settings, other data or other code, naming each that differs.
    """
    file, mine = output / FILE_NAME, _identity(spec, dataset)
    if not CheckpointStore(output / CHECKPOINTS, 1).whole_steps() or not file.is_file():
        file.write_json(mine)
        return
    ignored = tuple(f"versions.{name}" for name in _VERSIONS)
    accepts = spec.train.accept_other_versions
    before, now = flatten(file.read_json()), flatten(mine)
    differing = [
        f"{key}: {_shown(before, key)} → {_shown(now, key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not (accepts and key in ignored)
    ]
    if differing:
        raise UserError(
            f"the checkpoints in {output / CHECKPOINTS} belong to another run "
            f"({'; '.join(differing)}): going on from them would mix the two; {_remedy(differing)}."
        )


def _remedy(differing: list[str]) -> str:
    if all(text.startswith("versions.") for text in differing):
        return (
            "go on with those versions, set train.accept_other_versions=true to go on with these, "
            "or delete the folder to begin anew"
        )
    return "use another storage, or delete the folder to begin anew"


def _identity(spec: TrainSpec, dataset: Location) -> dict[str, Any]:
    artifact = Artifact.find(dataset)
    data = artifact.fingerprint if artifact else digest((dataset / MANIFEST).read_json())
    found = versions()
    return {
        "config": spec.identity(),
        "inputs": {"dataset": data} | fingerprints(spec),
        "versions": {name: found[name] for name in _VERSIONS if name in found},
    }


def _shown(values: dict[str, Any], key: str) -> str:
    text = str(values[key]) if key in values else "not there"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
