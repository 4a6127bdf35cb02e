"""Checkpoints: all that a run needs to go on exactly where it was.

A checkpoint is one folder in which every rank has written its own DeepSpeed files and the sums of
its metrics since the last row, and the first rank `state.json` and what the model is. Random state
is not in it: every draw is a pure function of seed and step. `pipeline.training.store` says when
one is whole.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed

from pipeline.artifact import digest, versions
from pipeline.batches import Position
from pipeline.errors import UserError
from pipeline.specs import TrainSpec
from pipeline.storage import Location
from pipeline.training.description import describe_model
from pipeline.training.finding import STATE
from pipeline.training.safe_reading import no_code_from_files, write_enums_by_value
from pipeline.training.store import (
    FORMAT,
    MANIFEST,
    CheckpointStore,
    Manifest,
    TornCheckpointError,
    verified,
)
from pipeline.training.universal import UNIVERSAL, convert_once, universal_manifest

_T = TypeVar("_T")

METERS = "meters"
TAG = "deepspeed"  # the folder of DeepSpeed's files
_OWNER = re.compile(r"zero_pp_rank_(\d+)_|^meters/(\d+)\.json$")


@dataclass(frozen=True)
class RunState:
    """How far a run has come."""

    step: int = 0  # optimizer steps made
    position: Position = field(default_factory=Position)  # the next global batch
    documents: int = 0  # seen so far, epoch after epoch
    tokens: int = 0  # predicted so far: neither padding nor BOS
    time_s: float = 0.0  # spent so far
    checkpoint_s: float = 0.0  # of it, what checkpoints kept training waiting
    skipped: int = 0  # of the steps, those without an update: their gradient was not finite
    skipped_in_a_row: int = 0
    best: dict[str, Any] | None = None  # the validation row with the lowest negative ELBO
    last_valid: dict[str, Any] | None = None


@dataclass(frozen=True)
class MeterState:
    """A rank's sums of the steps since the last row of metrics."""

    sums: list[float] = field(default_factory=list)
    steps: int = 0
    took_s: float = 0.0


@dataclass(frozen=True)
class _Record:
    """The content of `state.json`."""

    format: int
    state: dict[str, Any]
    world_size: int
    zero_stage: int
    config_fingerprint: str
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """A whole checkpoint, its files verified and on this machine."""

    manifest: Manifest
    state: RunState
    meter: MeterState
    folder: Path
    tag: str  # the folder in it that DeepSpeed reads

    @property
    def is_universal(self) -> bool:
        """Whether it was converted from another number of workers."""
        return self.tag == UNIVERSAL

    def load(self, engine: Any) -> None:
        """Put the engine where it was.

        Raises:
            UserError: if a file names code; none of it is run.
        """
        settings = [_settings(group) for group in engine.optimizer.param_groups]
        with no_code_from_files(self.folder):
            loaded, _ = engine.load_checkpoint(str(self.folder), tag=self.tag)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {self.folder}")
        if self.is_universal and self.manifest.zero_stage > 0:
            _mend_optimizer(engine, settings)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _mend_optimizer(engine: Any, settings: list[dict[str, Any]]) -> None:
    """Undo what DeepSpeed 0.19 gets wrong when it loads a converted checkpoint under ZeRO-3.

    Every group gets the settings of the first (its weight decay), and all share one tensor that
    counts their steps, so that each update counts once for every group.
    """
    for group, before in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(before)
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def write_checkpoint(
    engine: Any,
    spec: TrainSpec,
    state: RunState,
    meter: MeterState,
    rank: int,
    world_size: int,
    tokenizer: Location,
    scratch: Path,
) -> Manifest:
    """Write this rank's part to a local folder; return the manifest, still without files.

    A collective call: every rank must make it.
    """
    stage = spec.deepspeed.zero_stage
    write_enums_by_value()
    engine.save_checkpoint(str(scratch), tag=TAG, save_latest=False)
    _write_json(scratch / METERS / f"{rank:05d}.json", asdict(meter))
    if rank == 0:
        describe_model(engine.module.model, spec, tokenizer, scratch)
        record = _Record(
            FORMAT, asdict(state), world_size, stage, config_fingerprint(spec), versions()
        )
        _write_json(scratch / STATE, asdict(record))
    value = None if state.last_valid is None else state.last_valid["negative_elbo"]
    return Manifest(state.step, world_size, stage, value, {})


def _write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2))


def find_newest(
    store: CheckpointStore,
    spec: TrainSpec,
    rank: int,
    world_size: int,
    cache: Path,
    say: Callable[[str], None],
) -> Found | None:
    """Find the newest whole checkpoint, and make it readable for this number of workers.

    A collective call; every rank gets the same one. Those that are torn are passed over.

    Args:
        store: where to look.
        spec: the run that goes on.
        rank: this worker's.
        world_size: how many workers there are.
        cache: an empty local folder for copies from a remote storage.
        say: hears of each checkpoint that is torn, and of a conversion.

    Raises:
        UserError: if none is whole although one once was, or one belongs to other settings.
    """
    steps = _from_first(store.steps() if rank == 0 else None)
    torn: list[str] = []
    for step in steps:
        reader = _Reader(store, step, spec, rank, world_size, cache / str(step), say)
        found = reader.read()
        if found is not None:
            if rank == 0:
                store.drop_after(step)
            torch.distributed.barrier()
            return found
        torn += [str(store / step)] if reader.was_finished else []
    if torn:
        raise UserError(
            f"none of the run's checkpoints can be read ({', '.join(torn)}): each is damaged, and "
            f"training would begin anew; restore one, or delete {store.folder} to begin anew."
        )
    if rank == 0:
        store.drop_after(0)
    torch.distributed.barrier()
    return None


class _Reader:
    """Reads one checkpoint on every rank; what one finds torn is torn for all."""

    def __init__(
        self,
        store: CheckpointStore,
        step: int,
        spec: TrainSpec,
        rank: int,
        world_size: int,
        cache: Path,
        say: Callable[[str], None],
    ) -> None:
        self._store, self._step, self._spec = store, step, spec
        self._rank, self._world_size = rank, world_size
        self._folder, self._cache = store / step, cache
        self._say = say if rank == 0 else _say_nothing
        self.was_finished = True

    def read(self) -> Found | None:
        """The checkpoint; None where it is torn. A collective call."""
        manifest = self._agreed(self._manifest)
        if manifest is None:
            return None
        # Without sharding every rank holds all there is, so any number of workers can read it.
        converts = manifest.world_size != self._world_size and manifest.zero_stage > 0
        if converts:
            converted = self._agreed(lambda: self._converted(manifest))
            if converted is None:
                return None
        return self._agreed(lambda: self._found(manifest, UNIVERSAL if converts else TAG))

    def _manifest(self) -> Manifest:
        self.was_finished = (self._folder / MANIFEST).is_file()
        return self._store.manifest(self._step)

    def _converted(self, manifest: Manifest) -> bool:
        if self._rank == 0:
            convert_once(self._folder, manifest, TAG, self._say)
        return True

    def _found(self, manifest: Manifest, tag: str) -> Found:
        files = {n: f for n, f in manifest.files.items() if self._reads(n, manifest, tag)}
        if tag == UNIVERSAL:
            files |= universal_manifest(self._folder).files
        folder = verified(self._folder, files, self._cache)
        return Found(
            manifest, _state(folder, self._spec), self._meter(folder, manifest), folder, tag
        )

    def _reads(self, name: str, manifest: Manifest, tag: str) -> bool:
        if tag == UNIVERSAL and name.startswith(f"{TAG}/"):
            return False
        owner = _OWNER.search(name)
        if owner is None:
            return True
        if manifest.world_size != self._world_size:
            return self._rank == 0
        return int(owner[1] or owner[2]) == self._rank

    def _meter(self, folder: Path, manifest: Manifest) -> MeterState:
        """This rank's sums; of another number of workers, all on the first."""
        if manifest.world_size == self._world_size:
            return MeterState(**_json(folder / METERS / f"{self._rank:05d}.json"))
        if self._rank > 0:
            return MeterState()
        files = [folder / name for name in sorted(manifest.files) if name.startswith(METERS)]
        states = [MeterState(**_json(file)) for file in files]
        sums = [sum(values) for values in zip(*(state.sums for state in states), strict=True)]
        return MeterState(sums, states[0].steps, states[0].took_s)

    def _agreed(self, read: Callable[[], _T]) -> _T | None:
        value, problem = None, None
        try:
            value = read()
        except TornCheckpointError as error:
            problem = str(error)
        problems: list[str | None] = [None] * self._world_size
        torch.distributed.all_gather_object(problems, problem)
        first = next((found for found in problems if found), None)
        if first is None:
            return value
        self._say(f"warning: the checkpoint {self._folder} is torn ({first}): it is passed over")
        return None


def _say_nothing(text: str) -> None:
    del text


def _json(file: Path) -> Any:
    return json.loads(file.read_text())


def _state(folder: Path, spec: TrainSpec) -> RunState:
    record = _json(folder / STATE)
    if record["config_fingerprint"] != config_fingerprint(spec):
        raise UserError(
            "the checkpoint belongs to a run with other settings: going on would mix the two; "
            "use another storage, or delete the run's folder."
        )
    state = RunState(**record["state"])
    return replace(state, position=Position(**record["state"]["position"]))


def _from_first(value: Any) -> Any:
    """What the first rank has. A collective call."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def agreed_name() -> str:
    """A new name, the same on every rank. A collective call."""
    name: str = _from_first(uuid.uuid4().hex[:8])
    return name


def config_fingerprint(spec: TrainSpec) -> str:
    """Name the settings that decide a run's result."""
    return digest(spec.identity())
