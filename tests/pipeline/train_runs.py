"""Runs of the train stage that are killed, and what they must end as."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.shards import Dataset
from pipeline.specs import TrainSpec
from pipeline.stages.train import run_train
from pipeline.storage import Location
from pipeline.training.metrics import read_rows
from pipeline.training.store import CheckpointStore, Manifest, StoredFile
from tests.guards import HANG_S
from tests.pipeline.train_data import train_spec

DRIVER = Path(__file__).with_name("drive_training.py")


def resumable(**values: Any) -> TrainSpec:
    """A run of two workers with checkpoints, validations and rows at steps of their own."""
    given = {
        "train__num_workers": 2,
        "train__max_steps": 40,
        "train__micro_batch_tokens": 128,
        "train__checkpoint_every": 5,
        "train__eval_every": 10,
        "train__log_every": 3,
    }
    return train_spec(**(given | values))


def weights_in(output: Location, name: str = "last") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as copy:
        folder = (output / "weights" / name).download(Path(copy))
        return load_file(folder / "model.safetensors")


def run(spec: TrainSpec, dataset: Dataset, output: Location) -> dict[str, Any]:
    return run_train(spec, {"dataset": dataset.folder}, output)


def has_step(output: Location, step: int) -> bool:
    return any(row["step"] >= step for row in read_rows(output))


def await_(
    condition: Callable[[], bool],
    process: subprocess.Popen | None = None,
    every_s: float = 0.05,
) -> None:
    """Wait until a condition holds, while the process that is to bring it about lives."""
    deadline = time.monotonic() + HANG_S
    while time.monotonic() < deadline:
        if condition():
            return
        assert process is None or process.poll() is None, "the process ended before it was killed"
        time.sleep(every_s)
    raise AssertionError("waited too long")


def assert_same_run(output: Location, straight: Location, with_rows: bool = True) -> None:
    """Assert equal weights, bit for bit, and equal rows but for times."""
    timing = {"tokens_per_s", "step_s", "data_wait_s", "time_s", "took_s"}
    rows, expected = (
        [{k: v for k, v in row.items() if k not in timing} for row in read_rows(folder)]
        for folder in (output, straight)
    )
    assert rows == expected or not with_rows
    for name in ("last", "best"):
        weights, reference = weights_in(output, name), weights_in(straight, name)
        assert weights.keys() == reference.keys()
        different = [key for key in weights if not torch.equal(weights[key], reference[key])]
        assert not different


@contextmanager
def driver(spec: TrainSpec, dataset: Dataset, output: Location) -> Iterator[subprocess.Popen]:
    """A driver in a process of its own; it and all its processes are gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, str(DRIVER), spec.model_dump_json(), str(dataset.folder), str(output)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    family = [process]
    try:
        yield process
        family = [*psutil.Process(process.pid).children(recursive=True), process]
    except psutil.NoSuchProcess:
        pass
    finally:
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def worker_processes() -> list[psutil.Process]:
    """The training workers that this process's Ray has started."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]


def stored(store: CheckpointStore, step: int, value: float | None) -> None:
    """A checkpoint of one file."""
    folder = store / step
    (folder / "a").write_bytes(b"abc")
    sha256 = (folder / "a").sha256()
    Manifest(step, 1, 0, value, {"a": StoredFile(3, sha256)}).save(folder / "manifest.json")
    store.prune()
