"""Checkpoints: all that a run needs to go on exactly where it was.

A checkpoint is one folder in which every rank has written its own DeepSpeed files, and rank 0
`state.json` and what the model is. Random state is not in it: every draw is a pure function of seed
and step.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.artifact import digest, versions
from pipeline.batches import Position
from pipeline.errors import UserError
from pipeline.specs import TrainSpec
from pipeline.storage import Location
from pipeline.training.description import describe_model
from pipeline.training.safe_reading import no_code_from_files

FORMAT = 1
STATE = "state.json"
TAG = "deepspeed"  # the folder of DeepSpeed's files


@dataclass(frozen=True)
class RunState:
    """How far a run has come."""

    step: int = 0  # optimizer steps made
    position: Position = field(default_factory=Position)  # the next global batch
    documents: int = 0  # seen so far, epoch after epoch
    tokens: int = 0  # predicted so far: neither padding nor BOS
    time_s: float = 0.0  # spent so far
    skipped: int = 0  # of the steps, those without an update: their gradient was not finite
    skipped_in_a_row: int = 0
    best: dict[str, Any] | None = None  # the validation row with the lowest negative ELBO
    last_valid: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Record:
    """The content of `state.json`."""

    format: int
    state: dict[str, Any]
    world_size: int
    zero_stage: int
    config_fingerprint: str
    versions: dict[str, str] = field(default_factory=dict)


def checkpoint_name(step: int) -> str:
    """The folder's name; names sort as steps do."""
    return f"step-{step:09d}"


@contextmanager
def written_checkpoint(
    engine: Any,
    spec: TrainSpec,
    state: RunState,
    rank: int,
    world_size: int,
    tokenizer: Location,
) -> Iterator[Path]:
    """Write this rank's part to a temporary folder, which is there while the body runs.

    A collective call: every rank must make it.
    """
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
        engine.save_checkpoint(scratch, tag=TAG, save_latest=False)
        if rank == 0:
            describe_model(engine.module.model, spec, tokenizer, Path(scratch))
            record = _Record(
                FORMAT,
                asdict(state),
                world_size,
                spec.deepspeed.zero_stage,
                config_fingerprint(spec),
                versions(),
            )
            (Path(scratch) / STATE).write_text(json.dumps(asdict(record), indent=2))
        yield Path(scratch)


def load_checkpoint(engine: Any, spec: TrainSpec, folder: Path, world_size: int) -> RunState:
    """Put the engine where it was; return how far the run had come.

    Raises:
        UserError: if the checkpoint is of another format, config or number of workers.
    """
    record = json.loads((folder / STATE).read_text())
    if record["format"] != FORMAT:
        raise UserError(
            f"the checkpoint was written in format {record['format']}, but this version reads "
            f"{FORMAT}: go on with the version that began the run, or delete its folder."
        )
    if record["config_fingerprint"] != config_fingerprint(spec):
        raise UserError(
            "the checkpoint belongs to a run with other settings: going on would mix the two; "
            "use another storage, or delete the run's folder."
        )
    if record["world_size"] != world_size:
        raise UserError(
            f"the checkpoint was written by {record['world_size']} workers, but "
            f"train.num_workers={world_size}: each worker holds its own part of it; set "
            f"train.num_workers={record['world_size']}."
        )
    with no_code_from_files(folder):
        loaded, _ = engine.load_checkpoint(str(folder), tag=TAG)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")
    state = RunState(**record["state"])
    return replace(state, position=Position(**record["state"]["position"]))


def config_fingerprint(spec: TrainSpec) -> str:
    """Name the settings that decide a run's result."""
    return digest(spec.identity())
