"""Why a stage would run: what differs from the artifact that it is most like."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.artifact import Artifact, flatten
from pipeline.runner import Label, Planned
from pipeline.storage import Location

_THREADS = 16
_SHOWN = 12  # digits of a fingerprint


class Records:
    """The artifacts of a storage, read once a kind of stage."""

    def __init__(self, storage: Location) -> None:
        self._storage = storage
        self._found: dict[str, list[Artifact]] = {}

    def of(self, kind: str) -> list[Artifact]:
        """All artifacts of a kind, the newest first."""
        if kind not in self._found:
            folders = (self._storage / kind).children()
            with ThreadPoolExecutor(_THREADS) as pool:
                found = [artifact for artifact in pool.map(Artifact.find, folders) if artifact]
            self._found[kind] = sorted(found, key=lambda a: a.started_at, reverse=True)
        return self._found[kind]

    def done(self, kind: str) -> list[Artifact]:
        """Those that are done."""
        return [artifact for artifact in self.of(kind) if artifact.status == "done"]

    def earlier(self, planned: Planned, label: Label) -> Artifact | None:
        """The finished artifact that this stage had before: the job's own, else the one most like.

        None when there is none with as much as half of the settings in common.
        """
        candidates = [a for a in self.done(planned.kind.name) if a.folder != planned.output]
        own = [a for a in candidates if (a.job, a.name) == (label.job, label.name)]
        if own:
            return min(own, key=lambda artifact: len(list(differences(planned, artifact))))
        total = len(flatten(planned.spec.identity())) + len(planned.input_fingerprints)
        like = [(len(list(differences(planned, a))), a) for a in candidates]
        best = min(like, key=lambda pair: pair[0], default=None)
        return best[1] if best is not None and best[0] <= total / 2 else None


def differences(planned: Planned, earlier: Artifact) -> Iterator[str]:
    """Each key and input whose value is another than in an earlier artifact, with both values."""
    before, now = flatten(earlier.spec), flatten(planned.spec.identity())
    for key, value in now.items():
        if key not in before:  # written by a version that had no such key
            yield f"{key}: not there → {_shown(value)}"
        elif before[key] != value:
            yield f"{key}: {_shown(before[key])} → {_shown(value)}"
    for name, fingerprint in planned.input_fingerprints.items():
        old = earlier.inputs.get(name)
        if old != fingerprint:
            yield from _input_differences(planned, earlier, name, old, fingerprint)
    for name in earlier.inputs.keys() - planned.input_fingerprints.keys():
        yield f"{name}: {earlier.inputs[name][:_SHOWN]} → none"


def _input_differences(
    planned: Planned, earlier: Artifact, name: str, old: str | None, new: str
) -> Iterator[str]:
    files, before = planned.input_files.get(name, {}), earlier.input_files.get(name, {})
    changed = [f for f in sorted(files.keys() | before.keys()) if files.get(f) != before.get(f)]
    if not changed or not before:
        yield f"{name}: {old[:_SHOWN] if old else 'none'} → {new[:_SHOWN]}"
    for file in changed if before else ():
        yield f"{name} {file}: {_digits(before.get(file))} → {_digits(files.get(file))}"


def _digits(sha256: str | None) -> str:
    return sha256[:_SHOWN] if sha256 else "not there"


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
