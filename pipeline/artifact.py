"""A stage's record beside its output: what was computed, from what, by what, and the figures.

The fingerprint derives from the spec and the inputs alone, never from a path or a time, so that
the same work has the same name on every machine.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UserError
from pipeline.secrets import redacted
from pipeline.storage import Location

FORMAT = 1
FILE_NAME = "artifact.json"
_PACKAGES = ("della_model", "pipeline")
_RECORDED_PACKAGES = ("torch", "transformers", "tokenizers", "ray", "deepspeed", "pyarrow")


@dataclass(frozen=True)
class Artifact:
    """The content of `artifact.json`, and the folder that it lies in."""

    folder: Location
    stage: str
    fingerprint: str
    spec: dict[str, Any]
    inputs: dict[str, str]  # name -> fingerprint
    status: Literal["running", "done", "failed", "cancelled"]
    started_at: str
    finished_at: str | None = None
    took_s: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    # For readers only, never part of the identity: where the inputs lay, which files they were, in
    # which job this ran as which stage, how often it was begun, and why it failed if it did.
    input_folders: dict[str, str] = field(default_factory=dict)
    input_files: dict[str, dict[str, str]] = field(default_factory=dict)  # name -> file -> sha256
    job: str | None = None
    name: str | None = None
    attempts: int = 1
    error: str | None = None

    def save(self) -> Artifact:
        """Write `artifact.json` into the folder, without secrets; return self."""
        record = {"format": FORMAT} | redacted(asdict_shallow(self))
        (self.folder / FILE_NAME).write_json(record)
        return self

    @classmethod
    def load(cls, folder: Location) -> Artifact:
        """Read the record of a folder.

        Raises:
            UserError: if the folder holds no record, or one of another format.
        """
        record = cls.find(folder)
        if record is None:
            raise UserError(
                f"{folder} holds no {FILE_NAME}: expected a folder that a stage printed as "
                "'artifact: FOLDER'; check the path."
            )
        return record

    @classmethod
    def find(cls, folder: Location) -> Artifact | None:
        """Read the record of a folder, or None when there is none."""
        file = folder / FILE_NAME
        if not file.is_file():
            return None
        record = file.read_json()
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise UserError(
                f"{file} was written in another format than {FORMAT}, which this version reads; "
                "run the stage again with this version."
            )
        return cls(folder=folder, **record)


def numbered(name: str, index: int) -> str:
    """The name of one input of a list: `runs.0`."""
    return f"{name}.{index}"


def listed(inputs: Mapping[str, Location], name: str) -> list[Location]:
    """The folders of a list-valued input, in the order that they were given in."""
    found: list[Location] = []
    while (key := numbered(name, len(found))) in inputs:
        found.append(inputs[key])
    return found


def asdict_shallow(artifact: Artifact) -> dict[str, Any]:
    """The record's fields without the folder: a moved folder keeps its record true."""
    plain = asdict(
        Artifact(**{**artifact.__dict__, "folder": None})  # a Location does not deep-copy
    )
    del plain["folder"]
    return plain


def fingerprint(stage: str, identity: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Name a piece of work by content: sha256 over its canonical JSON, in hex.

    Raises:
        TypeError: if the identity holds a value with no stable form.
    """
    return digest({"stage": stage, "spec": dict(identity), "inputs": dict(inputs)})


def digest(value: Any) -> str:
    """Sha256, in hex, of the canonical JSON of a value."""
    _require_stable(value, "value")
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _require_stable(value: Any, where: str) -> None:
    if value is None or isinstance(value, bool | int | str):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where} is {value}, which has no stable form in JSON")
        return
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _require_stable(item, f"{where}[{index}]")
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; only text keys have a stable order")
            _require_stable(item, f"{where}.{key}")
        return
    raise TypeError(f"{where} is a {type(value).__name__}, which has no stable form")


def versions() -> dict[str, str]:
    """Versions of this code, of Python and of the packages that decide a result."""
    found = {"code": code_version(), "python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def code_version() -> str:
    """What the code that computes results is: sha256 over its sources, 12 hex digits.

    The same wherever the sources lie, with or without a repository around them.
    """
    root = Path(__file__).resolve().parents[1]
    sources = sorted(
        file for package in _PACKAGES for file in (root / package).rglob("*.py") if file.is_file()
    )
    content = {
        file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sources
    }
    return digest(content)[:12]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one table of dotted keys; tuples as lists, as JSON has them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
