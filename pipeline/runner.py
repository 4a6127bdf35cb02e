"""The graph of stages: which stage computes what, what is done already, and in which order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal

from pipeline.artifact import Artifact, fingerprint, now, numbered, versions
from pipeline.errors import UserError, nearest
from pipeline.specs import EvaluateSpec, PreprocessSpec, ReportSpec, Spec, TrainSpec, TuneSpec
from pipeline.storage import Location

StageName = Literal["preprocess", "train", "tune", "evaluate", "report"]


@dataclass(frozen=True)
class StageKind:
    """One kind of stage: its spec, its inputs, and the module that runs it.

    The module holds `run_<stage>(spec, inputs, output) -> figures` and, when the spec names
    content outside of any artifact (raw files, a pretrained backbone), `external_inputs(spec)
    -> {name: fingerprint}`.
    """

    name: str
    spec: type[Spec]
    inputs: tuple[str, ...]
    optional_inputs: tuple[str, ...] = ()
    # Inputs that are a list of folders; a stage finds them with `pipeline.artifact.listed`.
    list_inputs: tuple[str, ...] = ()

    @property
    def all_inputs(self) -> tuple[str, ...]:
        """Every name that an input of this stage may have."""
        return self.inputs + self.optional_inputs + self.list_inputs

    def _module(self) -> Any:
        return import_module(f"pipeline.stages.{self.name}")

    def run(self, spec: Spec, inputs: Mapping[str, Location], output: Location) -> dict[str, Any]:
        """Do the work; return the figures for the record."""
        run: Callable[..., dict[str, Any]] = getattr(self._module(), f"run_{self.name}")
        return run(spec, dict(inputs), output)

    def external_inputs(self, spec: Spec) -> dict[str, str]:
        """Fingerprints of what the spec names outside of any artifact."""
        if self.name == "report":
            return {}
        found: dict[str, str] = self._module().external_inputs(spec)
        return found


KINDS: dict[str, StageKind] = {
    kind.name: kind
    for kind in (
        StageKind("preprocess", PreprocessSpec, ()),
        StageKind("train", TrainSpec, ("dataset",)),
        StageKind("tune", TuneSpec, ("dataset",)),
        StageKind("evaluate", EvaluateSpec, ("weights", "dataset")),
        StageKind("report", ReportSpec, (), ("training", "figures"), ("runs",)),
    )
}


def kind_of(name: str) -> StageKind:
    """Look a stage up.

    Raises:
        UserError: if there is no such stage, with the nearest right name.
    """
    if name not in KINDS:
        raise UserError(
            f"'{name}' is not a stage{nearest(name, KINDS)}; the stages are: {', '.join(KINDS)}."
        )
    return KINDS[name]


@dataclass(frozen=True)
class Input:
    """What a stage reads: a folder, and the name by content of what lies or will lie there."""

    folder: Location
    fingerprint: str

    @classmethod
    def of_folder(cls, name: str, folder: Location) -> Input:
        """Read the fingerprint of a folder: its artifact's, or that of bare weights' files.

        Raises:
            UserError: if the folder is not there, or its stage has not finished.
        """
        if not folder.exists():
            raise UserError(f"{name}={folder} is not there: expected an artifact's folder.")
        artifact = Artifact.find(folder)
        if artifact is None and name == "weights":
            from pipeline.weights import fingerprint_weights

            return cls(folder, fingerprint_weights(folder))
        if artifact is None:
            artifact = Artifact.load(folder)
        if artifact.status != "done":
            raise UserError(
                f"{name}={folder} is the record of a {artifact.stage} stage that is "
                f"{artifact.status}, not done: run that stage's command again first."
            )
        return cls(folder, artifact.fingerprint)


@dataclass(frozen=True)
class Planned:
    """A stage whose inputs are known: where its artifact lies, and whether it is there."""

    kind: StageKind
    spec: Spec
    inputs: dict[str, Location]
    input_fingerprints: dict[str, str]
    fingerprint: str
    output: Location
    found: Artifact | None

    @property
    def is_done(self) -> bool:
        """Whether the finished artifact is there."""
        return self.found is not None and self.found.status == "done"

    def as_input(self) -> Input:
        """This stage's output as another's input, whether it is there already or not."""
        return Input(self.output, self.fingerprint)


def plan(
    name: str, spec: Spec, inputs: Mapping[str, Input | Sequence[Input]], storage: Location
) -> Planned:
    """Name a stage's work by content, and see whether it is done; nothing is run.

    Raises:
        UserError: if an input is missing or unknown, or an external one cannot be read.
    """
    kind = kind_of(name)
    _check_input_names(kind, inputs)
    flat = _numbered(inputs)
    fingerprints = {key: given.fingerprint for key, given in flat.items()}
    fingerprints |= kind.external_inputs(spec)
    identity = fingerprint(name, spec.identity(), fingerprints)
    output = storage / name / identity[:16]
    folders = {key: given.folder for key, given in flat.items()}
    return Planned(kind, spec, folders, fingerprints, identity, output, Artifact.find(output))


def _check_input_names(kind: StageKind, inputs: Mapping[str, Any]) -> None:
    known = kind.all_inputs
    for given in inputs:
        if given not in known:
            raise UserError(
                f"{kind.name}: unknown input '{given}'{nearest(given, known)}; its inputs are: "
                f"{', '.join(known) or 'none'}."
            )
    for needed in kind.inputs:
        if needed not in inputs:
            raise UserError(
                f"{kind.name}: '{needed}' has no value, but it is needed; set {needed}=..."
            )


def _numbered(inputs: Mapping[str, Input | Sequence[Input]]) -> dict[str, Input]:
    """Inputs by name; those of a list as `name.0`, `name.1`, …"""
    flat: dict[str, Input] = {}
    for name, given in inputs.items():
        if isinstance(given, Input):
            flat[name] = given
        else:
            flat |= {numbered(name, index): one for index, one in enumerate(given)}
    return flat


def run_stage(planned: Planned) -> Artifact:
    """Return the stage's artifact: the one that is there, else run the stage.

    An interrupted stage goes on in the same folder from what it finds there.
    """
    if planned.is_done and planned.found is not None:
        return planned.found
    started = time.monotonic()
    record = Artifact(
        folder=planned.output,
        stage=planned.kind.name,
        fingerprint=planned.fingerprint,
        spec=planned.spec.model_dump(mode="json"),
        inputs=planned.input_fingerprints,
        input_folders={name: str(folder) for name, folder in planned.inputs.items()},
        status="running",
        started_at=now(),
        versions=versions(),
    ).save()
    try:
        figures = planned.kind.run(planned.spec, planned.inputs, planned.output)
    except BaseException:
        replace(record, status="failed", finished_at=now()).save()
        raise
    return replace(
        record,
        status="done",
        finished_at=now(),
        took_s=round(time.monotonic() - started, 3),
        figures=figures,
    ).save()
