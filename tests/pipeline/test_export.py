"""Weights out of checkpoints, against those that the same workers exported themselves."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.artifact import Artifact
from pipeline.batches import Position
from pipeline.errors import UserError
from pipeline.shards import Dataset
from pipeline.specs import TrainSpec
from pipeline.specs.export import ExportSpec
from pipeline.stages.export import run_export
from pipeline.storage import Location
from pipeline.training.checkpoint_tensors import CheckpointTensors
from pipeline.training.finding import find_checkpoint
from pipeline.training.store import (
    CHECKPOINTS,
    MANIFEST,
    CheckpointStore,
    Manifest,
    StoredFile,
    checkpoint_name,
)
from pipeline.weights import load_model
from tests.pipeline.gloo_processes import start_processes
from tests.pipeline.train_data import small_dataset, train_spec

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
STEPS = 3
VARIANTS: dict[str, dict[str, Any]] = {
    "all-0": {"deepspeed__zero_stage": 0},
    "all-1": {"deepspeed__zero_stage": 1},
    "all-2": {"deepspeed__zero_stage": 2},
    "all-3": {"deepspeed__zero_stage": 3},
    # As of a big model, whose share on a worker is cut into several groups.
    "groups-3": {
        "deepspeed__zero_stage": 3,
        "deepspeed__extra": {"zero_optimization": {"sub_group_size": 20_000}},
    },
    "bf16-0": {"deepspeed__zero_stage": 0, "train__precision": "bf16"},
    "bf16-2": {"deepspeed__zero_stage": 2, "train__precision": "bf16"},
    "bf16-3": {"deepspeed__zero_stage": 3, "train__precision": "bf16"},
    "lora-2": {"deepspeed__zero_stage": 2, "train__trainable": "lora"},
    "lora-3": {"deepspeed__zero_stage": 3, "train__trainable": "lora"},
    "latents-0": {"deepspeed__zero_stage": 0, "train__trainable": "latents"},
    "latents-3": {"deepspeed__zero_stage": 3, "train__trainable": "latents"},
    # The objective has parameters of its own, which belong to no weights; a buffer travels too.
    "bag-1": {"deepspeed__zero_stage": 1, "train__bag_of_words": 0.5, "model__family": "bart"},
}


def checkpointed_trainings(
    rank: int, num_workers: int, specs: dict[str, TrainSpec], dataset: Location, folder: Path
) -> None:
    """Of each spec a few steps, then `checkpoint` and `weights` as a run leaves them."""
    for name, spec in specs.items():
        _checkpointed(rank, num_workers, spec, dataset, folder / name)


def _checkpointed(
    rank: int, num_workers: int, spec: TrainSpec, dataset: Location, folder: Path
) -> None:
    from pipeline.training.checkpoint import MeterState, RunState, agreed_name, write_checkpoint
    from pipeline.training.export import export_weights
    from pipeline.training.meter import Meter
    from pipeline.training.setup import start_run
    from pipeline.training.upload import Uploader
    from pipeline.training.worker import train_step

    run = start_run(spec, dataset, rank, num_workers, use_gpu=False)
    loader = run.loader(Position())
    meter = Meter(run.num_layers, run.device)
    for step in range(STEPS):
        train_step(run, step, loader.next(), meter)
    loader.close()
    weights = Location.parse(folder / "weights")
    export_weights(run.engine, spec, run.tokenizer_folder, weights, rank == 0)
    scratch = folder / f"scratch-{rank}"
    scratch.mkdir(parents=True)
    manifest = write_checkpoint(
        run.engine, spec, RunState(step=STEPS), MeterState(), rank, num_workers,
        run.tokenizer_folder, scratch,
    )  # fmt: skip
    store = CheckpointStore(Location.parse(folder / CHECKPOINTS), keep=1)
    uploader = Uploader(store, rank, num_workers, agreed_name(), committed=0)
    uploader.submit(scratch, manifest)
    uploader.wait()
    torch.distributed.barrier()
    uploader.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and the run's own weights of each variant, by two workers."""
    folder = tmp_path_factory.mktemp("trained")
    dataset: Dataset = small_dataset(folder / "data")
    specs: dict[str, TrainSpec] = {name: train_spec(**values) for name, values in VARIANTS.items()}
    start_processes(checkpointed_trainings, 2, specs, dataset.folder, folder)
    return folder


def checkpoint_of(trained: Path, variant: str) -> Path:
    return trained / variant / CHECKPOINTS / checkpoint_name(STEPS)


def with_manifest_of_its_files(checkpoint: Path) -> Path:
    """Have a changed checkpoint say that it is what it is: its checksums alone do not save it."""
    folder = Location.parse(checkpoint)
    manifest = Manifest.load(folder / MANIFEST)
    files = {
        name: StoredFile((checkpoint / name).stat().st_size, (folder / name).sha256())
        for name in manifest.files
        if (checkpoint / name).is_file()
    }
    replace(manifest, files=files).save(folder / MANIFEST)
    return checkpoint


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        below = str(file.parent.relative_to(folder))
        found |= {f"{below}:{name}": tensor for name, tensor in load_file(file).items()}
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_of_a_checkpoint_equals_the_runs_own_weights_bit_for_bit(
    trained: Path, tmp_path: Path, variant: str
) -> None:
    checkpoint = Location.parse(checkpoint_of(trained, variant))
    figures = run_export(ExportSpec(), {"checkpoint": checkpoint}, Location.parse(tmp_path))
    expected = tensors_of(trained / variant / "weights")
    found = tensors_of(tmp_path / "weights")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    names = {f.name for f in (trained / variant / "weights").iterdir()}
    assert {f.name for f in (tmp_path / "weights").iterdir()} == names
    assert figures["step"] == 3
    assert figures["num_ranks"] == 2
    load_model(Location.parse(tmp_path / "weights"))


@pytest.mark.parametrize("variant", ["all-1", "bf16-2", "all-3"])
def test_checkpoint_tensors_equal_what_deepspeeds_own_script_finds(
    trained: Path, variant: str
) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    checkpoint = checkpoint_of(trained, variant)
    expected = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="deepspeed")
    found = CheckpointTensors(checkpoint / "deepspeed")
    assert len(expected) > 50
    for name, tensor in expected.items():
        assert torch.equal(found.read(name), tensor), name


def said(checkpoint: Path, step: int, best: dict[str, Any] | None = None) -> None:
    """Have a checkpoint say that it is of another step."""
    folder = Location.parse(checkpoint)
    record = (folder / "state.json").read_json()
    changed = record | {"state": record["state"] | {"step": step, "best": best}}
    (folder / "state.json").write_json(changed)
    replace(Manifest.load(folder / MANIFEST), step=step).save(folder / MANIFEST)
    with_manifest_of_its_files(checkpoint)


def test_export_job_takes_a_runs_last_or_best_checkpoint(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "train" / "0123456789abcdef"
    store = CheckpointStore(Location.parse(run / CHECKPOINTS), keep=2)
    (run / CHECKPOINTS).mkdir(parents=True)
    for step in (2, 3):
        folder = run / CHECKPOINTS / checkpoint_name(step)
        shutil.copytree(checkpoint_of(trained, "all-2"), folder)
        said(folder, step)
    Artifact(Location.parse(run), "train", "0" * 64, {}, {}, "failed", "2026-01-01").save()
    assert find_checkpoint(Location.parse(run)).name == "step-000000003"
    with pytest.raises(UserError, match="nothing was validated"):
        find_checkpoint(Location.parse(run), "best")
    said(run / CHECKPOINTS / checkpoint_name(3), 3, best={"step": 1})
    with pytest.raises(UserError, match="no checkpoint of the best step, 1, was kept"):
        find_checkpoint(Location.parse(run), "best")
    said(run / CHECKPOINTS / checkpoint_name(3), 3, best={"step": 2})
    (store / 4 / "state.json").write_json({})  # its writing was never finished
    assert find_checkpoint(Location.parse(run), "best").name == "step-000000002"

    command = [sys.executable, "jobs/export.py", f"checkpoint={run}", f"storage={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    artifact = Path(done.stdout.strip().splitlines()[-1].removeprefix("artifact: "))
    expected = tensors_of(trained / "all-2" / "weights")
    found = tensors_of(artifact / "weights")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    load_model(Location.parse(artifact))
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "export: already done" in again.stdout


def refused(inputs: dict[str, Location], tmp_path: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        run_export(ExportSpec(), inputs, Location.parse(tmp_path / "out"))
    assert "\n" not in caught.value.message


def test_export_of_a_torn_or_foreign_folder_is_one_sentence(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(Location.parse(tmp_path))
    torn = tmp_path / "torn"
    shutil.copytree(checkpoint_of(trained, "all-2"), torn)
    part = torn / "deepspeed" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    whole = part.read_bytes()
    inputs = {"checkpoint": Location.parse(torn)}
    part.unlink()
    refused(inputs, tmp_path, "is torn .*zero_pp_rank_1.* is missing")
    part.write_bytes(whole[:-9] + b"123456789")
    refused(inputs, tmp_path, "the checksum of its .*zero_pp_rank_1.* is wrong")
    # Whoever wrote its manifest anew is told what the files themselves show.
    part.write_bytes(whole[: len(whole) // 2])
    with_manifest_of_its_files(torn)
    refused(inputs, tmp_path, "zero_pp_rank_1.*truncated or damaged")
    part.unlink()
    with_manifest_of_its_files(torn)
    refused(inputs, tmp_path, "of 1 ranks, but 2 wrote it")
    part.write_bytes(whole)
    (torn / "train_spec.json").unlink()
    with_manifest_of_its_files(torn)
    refused(inputs, tmp_path, "does not say which model it is of")
    assert not (tmp_path / "out" / "weights").exists()


class _Touches:
    """Writes a file when it is unpickled: what a malicious checkpoint would do."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def test_export_of_a_malicious_checkpoint_runs_none_of_its_code(
    trained: Path, tmp_path: Path
) -> None:
    bad, touched = tmp_path / "bad", tmp_path / "touched"
    shutil.copytree(checkpoint_of(trained, "all-2"), bad)
    file = bad / "deepspeed" / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=False)
    torch.save(content | {"more": _Touches(touched)}, file)
    with_manifest_of_its_files(bad)
    pickle.loads(pickle.dumps(_Touches(touched)))
    assert touched.exists(), "the trap works"
    touched.unlink()
    with pytest.raises(UserError, match="is refused") as caught:
        run_export(
            ExportSpec(), {"checkpoint": Location.parse(bad)}, Location.parse(tmp_path / "out")
        )
    assert not touched.exists()
    assert "\n" not in caught.value.message


def _resume(rank: int, num_workers: int, spec: TrainSpec, dataset: Location, run: Path) -> None:
    from pipeline.training.checkpoint import find_newest
    from pipeline.training.setup import start_run

    store = CheckpointStore(Location.parse(run / CHECKPOINTS), keep=1)
    try:
        found = find_newest(store, spec, rank, num_workers, run / "cache", print)
        assert found is not None
        universal = found.is_universal
        started = start_run(
            spec, dataset, rank, num_workers, use_gpu=False, load_universal=universal
        )
        found.load(started.engine)
        (run / "loaded").touch()
    except UserError as error:
        (run / "refused").write_text(error.message)


@pytest.mark.parametrize(("stage", "num_workers"), [(0, 2), (3, 2), (2, 1)])
def test_resume_from_a_malicious_checkpoint_runs_none_of_its_code(
    trained: Path, tmp_path: Path, stage: int, num_workers: int
) -> None:
    """On as many workers as wrote it, and converted for another number."""
    spec = train_spec(**VARIANTS[f"all-{stage}"])
    dataset = Location.parse(trained / "data")
    good, bad = tmp_path / "good", tmp_path / "bad"
    touched = tmp_path / "touched"
    for run in (good, bad):
        copy = run / CHECKPOINTS / checkpoint_name(STEPS)
        shutil.copytree(checkpoint_of(trained, f"all-{stage}"), copy)
    files = bad / CHECKPOINTS / checkpoint_name(STEPS) / "deepspeed"
    for file in files.glob("*_model_states.pt"):
        content = torch.load(file, weights_only=False)
        torch.save(content | {"more": _Touches(touched)}, file)
    with_manifest_of_its_files(files.parent)
    start_processes(_resume_both, num_workers, spec, dataset, good, bad)
    assert (good / "loaded").exists()
    assert not (bad / "loaded").exists()
    assert "nothing of it was run" in (bad / "refused").read_text()
    assert not touched.exists()


def _resume_both(
    rank: int, num_workers: int, spec: TrainSpec, dataset: Location, *runs: Path
) -> None:
    for run in runs:
        _resume(rank, num_workers, spec, dataset, run)
