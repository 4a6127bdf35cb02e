"""Weights out of checkpoints, against those that the same workers exported themselves."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
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
    from pipeline.training.checkpoint import RunState, written_checkpoint
    from pipeline.training.export import export_weights
    from pipeline.training.meter import Meter
    from pipeline.training.setup import start_run
    from pipeline.training.worker import train_step

    run = start_run(spec, dataset, rank, num_workers, use_gpu=False)
    loader = run.loader(Position())
    meter = Meter(run.num_layers, run.device)
    for step in range(STEPS):
        train_step(run, step, loader.next(), meter)
    loader.close()
    weights = Location.parse(folder / "weights")
    export_weights(run.engine, spec, run.tokenizer_folder, weights, rank == 0)
    with written_checkpoint(
        run.engine, spec, RunState(step=STEPS), rank, num_workers, run.tokenizer_folder
    ) as written:
        # Ray Train merges what the ranks wrote into one folder.
        shutil.copytree(written, folder / "checkpoint", dirs_exist_ok=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and the run's own weights of each variant, by two workers."""
    folder = tmp_path_factory.mktemp("trained")
    dataset: Dataset = small_dataset(folder / "data")
    specs: dict[str, TrainSpec] = {name: train_spec(**values) for name, values in VARIANTS.items()}
    start_processes(checkpointed_trainings, 2, specs, dataset.folder, folder)
    return folder


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
    checkpoint = Location.parse(trained / variant / "checkpoint")
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

    checkpoint = trained / variant / "checkpoint"
    expected = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="deepspeed")
    found = CheckpointTensors(checkpoint / "deepspeed")
    assert len(expected) > 50
    for name, tensor in expected.items():
        assert torch.equal(found.read(name), tensor), name


def test_export_job_takes_a_runs_last_or_best_checkpoint(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "train" / "0123456789abcdef"
    for step in (2, 3):
        folder = run / "checkpoints" / f"step-{step:09d}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(trained / "all-2" / "checkpoint", folder)
    state = Location.parse(run / "checkpoints" / "step-000000002" / "state.json")
    record = state.read_json()
    state.write_json(record | {"state": record["state"] | {"step": 2}})
    Artifact(Location.parse(run), "train", "0" * 64, {}, {}, "failed", "2026-01-01").save()
    assert find_checkpoint(Location.parse(run)).name == "step-000000003"
    with pytest.raises(UserError, match="nothing was validated"):
        find_checkpoint(Location.parse(run), "best")
    state = Location.parse(run / "checkpoints" / "step-000000003" / "state.json")
    record = state.read_json()
    state.write_json(record | {"state": record["state"] | {"best": {"step": 2}}})
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


def test_export_of_a_torn_or_foreign_folder_is_one_sentence(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(Location.parse(tmp_path))
    torn = tmp_path / "torn"
    shutil.copytree(trained / "all-2" / "checkpoint", torn)
    part = torn / "deepspeed" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    whole = part.read_bytes()
    inputs = {"checkpoint": Location.parse(torn)}
    part.unlink()
    with pytest.raises(UserError, match="of 1 ranks, but 2 wrote it"):
        run_export(ExportSpec(), inputs, Location.parse(tmp_path / "out"))
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="zero_pp_rank_1") as caught:
        run_export(ExportSpec(), inputs, Location.parse(tmp_path / "out"))
    assert "\n" not in caught.value.message
    part.write_bytes(whole)
    (torn / "train_spec.json").unlink()
    with pytest.raises(UserError, match="does not say which model it is of"):
        run_export(ExportSpec(), inputs, Location.parse(tmp_path / "out"))
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
    shutil.copytree(trained / "all-2" / "checkpoint", bad)
    file = bad / "deepspeed" / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=False)
    torch.save(content | {"more": _Touches(touched)}, file)
    pickle.loads(pickle.dumps(_Touches(touched)))
    assert touched.exists(), "the trap works"
    touched.unlink()
    with pytest.raises(UserError, match="is refused") as caught:
        run_export(
            ExportSpec(), {"checkpoint": Location.parse(bad)}, Location.parse(tmp_path / "out")
        )
    assert not touched.exists()
    assert "\n" not in caught.value.message


def _resume(rank: int, num_workers: int, spec: TrainSpec, dataset: Location, folder: Path) -> None:
    from pipeline.training.checkpoint import load_checkpoint
    from pipeline.training.setup import start_run

    run = start_run(spec, dataset, rank, num_workers, use_gpu=False)
    try:
        load_checkpoint(run.engine, spec, folder, num_workers)
        (folder.parent / "loaded").touch()
    except UserError as error:
        (folder.parent / "refused").write_text(error.message)


@pytest.mark.parametrize("stage", [0, 3])
def test_resume_from_a_malicious_checkpoint_runs_none_of_its_code(
    trained: Path, tmp_path: Path, stage: int
) -> None:
    spec = train_spec(deepspeed__zero_stage=stage)
    dataset = Location.parse(trained / "data")
    good, bad = tmp_path / "good" / "checkpoint", tmp_path / "bad" / "checkpoint"
    touched = tmp_path / "touched"
    for folder in (good, bad):
        shutil.copytree(trained / f"all-{stage}" / "checkpoint", folder)
    for file in (bad / "deepspeed").glob("*_model_states.pt"):
        content = torch.load(file, weights_only=False)
        torch.save(content | {"more": _Touches(touched)}, file)
    start_processes(_resume_both, 2, spec, dataset, good, bad)
    assert (good.parent / "loaded").exists()
    assert not (bad.parent / "loaded").exists()
    assert "nothing of it was run" in (bad.parent / "refused").read_text()
    assert not touched.exists()


def _resume_both(
    rank: int, num_workers: int, spec: TrainSpec, dataset: Location, *folders: Path
) -> None:
    for folder in folders:
        _resume(rank, num_workers, spec, dataset, folder)
