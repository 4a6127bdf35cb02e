"""The graph of stages: which stage computes what, what is done already, and in which order."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal

from rich.console import Console

from pipeline.artifact import Artifact, code_version, fingerprint, now, numbered, versions
from pipeline.errors import UserError, nearest, user_error_within
from pipeline.external import external_inputs
from pipeline.lease import FOLDER as LEASE
from pipeline.lease import Claim, held
from pipeline.progress import Progress
from pipeline.specs import EvaluateSpec, PreprocessSpec, ReportSpec, Spec, TrainSpec, TuneSpec
from pipeline.specs.export import ExportSpec
from pipeline.storage import Location

StageName = Literal["preprocess", "train", "tune", "evaluate", "report", "export"]


@dataclass(frozen=True)
class StageKind:
    """One kind of stage: its spec, its inputs, and the module that runs it.

    The module holds `run_<stage>(spec, inputs, output) -> figures`.
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

    def run(self, spec: Spec, inputs: Mapping[str, Location], output: Location) -> dict[str, Any]:
        """Do the work; return the figures for the record."""
        module = import_module(f"pipeline.stages.{self.name}")
        run: Callable[..., dict[str, Any]] = getattr(module, f"run_{self.name}")
        return run(spec, dict(inputs), output)


KINDS: dict[str, StageKind] = {
    kind.name: kind
    for kind in (
        StageKind("preprocess", PreprocessSpec, ()),
        StageKind("train", TrainSpec, ("dataset",)),
        StageKind("tune", TuneSpec, ("dataset",)),
        StageKind("evaluate", EvaluateSpec, ("weights", "dataset")),
        StageKind("report", ReportSpec, (), ("training", "figures"), ("runs", "studies")),
        StageKind("export", ExportSpec, ("checkpoint",)),
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
        """Read the fingerprint of a folder: its artifact's, or that of bare weights' or of a
        checkpoint's files.

        Raises:
            UserError: if the folder is not there, or its stage has not finished.
        """
        if not folder.exists():
            raise UserError(f"{name}={folder} is not there: expected an artifact's folder.")
        artifact = Artifact.find(folder)
        if artifact is None and name == "weights":
            from pipeline.weights import fingerprint_weights

            return cls(folder, fingerprint_weights(folder))
        if artifact is None and name == "checkpoint":
            from pipeline.training.finding import find_checkpoint, fingerprint_checkpoint

            return cls(folder, fingerprint_checkpoint(find_checkpoint(folder)))
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
    input_files: dict[str, dict[str, str]]  # of external inputs: name -> file -> sha256
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
    name: str,
    spec: Spec,
    inputs: Mapping[str, Input | Sequence[Input]],
    storage: Location,
    with_code: bool = False,
) -> Planned:
    """Name a stage's work by content, and see whether it is done; nothing is run.

    Args:
        name: the kind of stage.
        spec: what to do.
        inputs: what to read.
        storage: where artifacts lie.
        with_code: make the code's version part of the identity, so that changed code runs again.

    Raises:
        UserError: if an input is missing or unknown, or an external one cannot be read.
    """
    kind = kind_of(name)
    _check_input_names(kind, inputs)
    flat = _numbered(inputs)
    external = external_inputs(spec)
    fingerprints = {key: given.fingerprint for key, given in flat.items()}
    fingerprints |= {key: found.fingerprint for key, found in external.items()}
    fingerprints |= {"code": code_version()} if with_code else {}
    identity = fingerprint(name, spec.identity(), fingerprints)
    output = storage / name / identity[:16]
    return Planned(
        kind=kind,
        spec=spec,
        inputs={key: given.folder for key, given in flat.items()},
        input_fingerprints=fingerprints,
        input_files={key: found.files for key, found in external.items() if found.files},
        fingerprint=identity,
        output=output,
        found=Artifact.find(output),
    )


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


@dataclass(frozen=True)
class Label:
    """For whom a stage runs: which job, and as which of its stages."""

    job: str | None = None
    name: str | None = None


def run_stage(planned: Planned, label: Label = Label(), force: bool = False) -> Artifact:
    """Return the stage's artifact: the one that is there, else run the stage.

    An interrupted stage goes on in the same folder from what it finds there. While another process
    runs it, this one waits, and then takes its result.

    Args:
        planned: the stage.
        label: for whom it runs.
        force: do it anew, although it is done; what lies in its folder is deleted.

    Raises:
        KeyboardInterrupt: if it was interrupted, or cancelled by `request_cancel`.
    """
    if planned.is_done and planned.found is not None and not force:
        return planned.found
    stopped: list[str] = []

    def stop(why: str) -> Callable[[], None]:
        def interrupt() -> None:
            stopped.append(why)
            os.kill(os.getpid(), signal.SIGINT)

        return interrupt

    with (
        _sigint_interrupts(),
        held(
            planned.output,
            progress=Progress.newest,
            on_wait=lambda claim: _say_who_is_first(planned, claim),
            on_cancel=stop("it was cancelled"),
            on_lost=stop("its lease was lost: the storage could not be written for too long"),
        ),
    ):
        found = Artifact.find(planned.output)
        if found is not None and found.status == "done":
            if not force:
                return found
            _clear(planned.output)
        return _run_and_record(planned, label, found, stopped)


@contextmanager
def _sigint_interrupts() -> Iterator[None]:
    """While the body runs, a SIGINT raises KeyboardInterrupt, also where we were born deaf to it.

    A script's shell starts what it leaves in the background with SIGINT ignored, and so are its
    children; a stage that nobody can interrupt would go on when it is cancelled, or has lost its
    folder to another process.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run_and_record(
    planned: Planned, label: Label, before: Artifact | None, stopped: list[str]
) -> Artifact:
    started = time.monotonic()
    record = Artifact(
        folder=planned.output,
        stage=planned.kind.name,
        fingerprint=planned.fingerprint,
        spec=planned.spec.model_dump(mode="json"),
        inputs=planned.input_fingerprints,
        input_folders={name: str(folder) for name, folder in planned.inputs.items()},
        input_files=planned.input_files,
        status="running",
        started_at=now(),
        versions=versions(),
        job=label.job,
        name=label.name,
        attempts=before.attempts + 1 if before and before.status != "done" else 1,
    ).save()
    try:
        figures = planned.kind.run(planned.spec, planned.inputs, planned.output)
    except (KeyboardInterrupt, SystemExit):  # Ray Train leaves the process when it is interrupted
        why = stopped[0] if stopped else "it was interrupted"
        replace(record, status="cancelled", finished_at=now(), error=why).save()
        raise KeyboardInterrupt from None
    except BaseException as error:
        reason = user_error_within(error)
        text = reason.message if reason else f"{type(error).__name__}: {error}"
        replace(record, status="failed", finished_at=now(), error=_short(text)).save()
        raise
    return replace(
        record,
        status="done",
        finished_at=now(),
        took_s=round(time.monotonic() - started, 3),
        figures=figures,
    ).save()


def _say_who_is_first(planned: Planned, claim: Claim) -> None:
    Console().print(
        f"{planned.kind.name}: {claim.holder} has been running this since {claim.since}; waiting "
        "for its result",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _clear(folder: Location) -> None:
    for child in folder.children():
        if child.name != LEASE:
            child.delete()


def _short(text: str, most: int = 600) -> str:
    """An error's text for the record: the last line, a worker's traceback ends with the reason."""
    lines = text.strip().splitlines() or [""]
    return lines[-1].strip()[:most]
