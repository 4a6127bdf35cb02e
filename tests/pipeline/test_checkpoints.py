"""Checkpoints on real gloo workers: whole, torn, and of another number of workers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.shards import Dataset
from pipeline.specs import TrainSpec
from pipeline.storage import Location
from pipeline.training.store import (
    CheckpointStore,
    Manifest,
    StoredFile,
    TornCheckpointError,
    checkpoint_name,
)
from tests.pipeline.gloo_processes import start_processes
from tests.pipeline.train_data import small_dataset, train_spec
from tests.pipeline.train_runs import await_, stored


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_dataset(tmp_path_factory.mktemp("data"))


def leg(
    rank: int,
    num_workers: int,
    specs: dict[str, TrainSpec],
    dataset: Location,
    folder: Location,
    until: int,
    result: Path,
) -> None:
    """Go on with each run from its newest whole checkpoint to a step, and leave one of that."""
    from pipeline.training.process import prepare_process

    prepare_process(1, use_gpu=False)
    found = {
        name: _one_leg(rank, num_workers, spec, dataset, folder / name, until)
        for name, spec in specs.items()
    }
    if rank == 0:
        torch.save(found, result)


def _one_leg(
    rank: int, num_workers: int, spec: TrainSpec, dataset: Location, output: Location, until: int
) -> dict[str, Any]:
    from pipeline.training.checkpoint import (
        MeterState,
        RunState,
        agreed_name,
        find_newest,
        write_checkpoint,
    )
    from pipeline.training.engine import full_state_dict
    from pipeline.training.meter import Meter
    from pipeline.training.setup import start_run
    from pipeline.training.upload import Uploader
    from pipeline.training.worker import train_step

    store = CheckpointStore(output, keep=2)
    said: list[str] = []
    with tempfile.TemporaryDirectory() as cache:
        found = find_newest(store, spec, rank, num_workers, Path(cache), said.append)
        universal = found is not None and found.is_universal
        run = start_run(spec, dataset, rank, num_workers, False, load_universal=universal)
        if found is not None:
            found.load(run.engine)
    state = found.state if found else RunState()
    start = state.step
    uploader = Uploader(store, rank, num_workers, agreed_name(), state.step)
    meter, losses = Meter(run.num_layers, run.device), []
    loader = run.loader(state.position)
    while state.step < until:
        batch = loader.next()
        train_step(run, state.step, batch, meter)
        losses.append(meter.reduced()["loss"])
        state = RunState(step=state.step + 1, position=batch.next_position)
    loader.close()
    scratch = Path(tempfile.mkdtemp())
    meter_state = MeterState(meter.local, 0)
    manifest = write_checkpoint(
        run.engine, spec, state, meter_state, rank, num_workers, run.tokenizer_folder, scratch
    )
    uploader.submit(scratch, manifest)
    uploader.wait()
    torch.distributed.barrier()
    uploader.close()
    weights = full_state_dict(run.engine, rank == 0)
    return {"losses": losses, "start": start, "said": said, "weights": weights}


def run_legs(
    specs: dict[str, TrainSpec],
    dataset: Dataset,
    folder: Path,
    legs: list[tuple[int, int]],
    output: Location | None = None,
) -> list[dict[str, dict[str, Any]]]:
    """Each leg is a number of workers, and the step that they train to; all runs in each.

    Checkpoints go to `output`, by default to the folder, where the legs' results lie.
    """
    folder.mkdir(exist_ok=True)
    output = output or Location.parse(folder)
    found = []
    for number, (num_workers, until) in enumerate(legs):
        result = folder / f"{number}.pt"
        start_processes(leg, num_workers, specs, dataset.folder, output, until, result)
        found.append(torch.load(result))
    return found


def elastic_spec(stage: int, **values: Any) -> TrainSpec:
    return train_spec(
        deepspeed__zero_stage=stage,
        train__micro_batch_tokens=128,  # 4 micro-batches: 2 on each of two workers
        train__num_workers=[1, 2],
        **values,
    )


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-4, msg=name)


ELASTIC = {
    "stage0": elastic_spec(0),
    "stage1": elastic_spec(1),
    "stage2": elastic_spec(2),
    "stage3": elastic_spec(3),
    # As of a big model, whose share on a worker is cut into several groups.
    "stage3_groups": elastic_spec(
        3, deepspeed__extra={"zero_optimization": {"sub_group_size": 20_000}}
    ),
    "stage2_bf16": elastic_spec(2, train__precision="bf16"),
    "stage1_latents": elastic_spec(1, train__trainable="latents"),
}


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.short
def test_workers_2_to_1_to_2_follow_the_straight_run(dataset: Dataset, tmp_path: Path) -> None:
    (straight,) = run_legs(ELASTIC, dataset, tmp_path / "straight", [(2, 6)])
    legs = run_legs(ELASTIC, dataset, tmp_path / "run", [(2, 2), (1, 4), (2, 6)])
    for name, spec in ELASTIC.items():
        assert [found[name]["start"] for found in legs] == [0, 2, 4]
        losses = [loss for found in legs for loss in found[name]["losses"]]
        rounding = 2e-3 if spec.train.precision == "bf16" else 1e-5
        assert losses == pytest.approx(straight[name]["losses"], rel=rounding), name
        if spec.train.precision == "fp32":
            assert_near(legs[-1][name]["weights"], straight[name]["weights"])
        converted = tmp_path / "run" / name / checkpoint_name(4) / "universal.json"
        assert converted.is_file() == (spec.deepspeed.zero_stage > 0), name


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.short
def test_same_workers_stopped_and_started_end_bit_for_bit_as_the_straight_run(
    dataset: Dataset, tmp_path: Path
) -> None:
    (straight,) = run_legs(ELASTIC, dataset, tmp_path / "straight", [(2, 4)])
    legs = run_legs(ELASTIC, dataset, tmp_path / "run", [(2, 1), (2, 4)])
    for name in ELASTIC:
        assert [found[name]["start"] for found in legs] == [0, 1]
        assert [x for found in legs for x in found[name]["losses"]] == straight[name]["losses"]
        for key, value in straight[name]["weights"].items():
            assert torch.equal(legs[-1][name]["weights"][key], value), (name, key)


CONVERT = """
import sys
from pipeline.storage import Location
from pipeline.training.store import MANIFEST, Manifest
from pipeline.training.universal import convert_once

checkpoint = Location.parse(sys.argv[1])
convert_once(checkpoint, Manifest.load(checkpoint / MANIFEST), "deepspeed", print)
"""


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("point", ["lease", "universal"])
def test_conversion_killed_is_made_again_to_the_same_weights(
    dataset: Dataset, tmp_path: Path, point: str
) -> None:
    """Killed once the lease is held, and once the first of the result is in the storage."""
    spec = {"run": elastic_spec(3)}
    run_legs(spec, dataset, tmp_path / "killed", [(2, 2)])
    shutil.copytree(tmp_path / "killed", tmp_path / "whole")
    checkpoint = tmp_path / "killed" / "run" / checkpoint_name(2)
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERT, str(checkpoint)], cwd=Path(__file__).parents[2]
    )
    await_((checkpoint / point).exists, process, every_s=0.001)
    process.kill()
    process.wait()
    assert not (checkpoint / "universal.json").exists(), "killed too late"
    (found,) = run_legs(spec, dataset, tmp_path / "killed", [(1, 4)])
    (expected,) = run_legs(spec, dataset, tmp_path / "whole", [(1, 4)])
    assert found["run"]["start"] == 2
    assert found["run"]["losses"] == expected["run"]["losses"]
    for name, value in expected["run"]["weights"].items():
        assert torch.equal(found["run"]["weights"][name], value), name


@pytest.mark.slow
@pytest.mark.faults
def test_conversion_on_object_storage_follows_the_local_one(
    dataset: Dataset, tmp_path: Path
) -> None:
    from tests.jobs.s3_server import s3_server

    spec, legs = {"run": elastic_spec(2)}, [(2, 2), (1, 4), (2, 5)]
    local = run_legs(spec, dataset, tmp_path / "local", legs)
    with s3_server():
        bucket = Location.parse("s3://bucket/runs")
        remote = run_legs(spec, dataset, tmp_path / "remote", legs, bucket)
        assert (bucket / "run" / checkpoint_name(4) / "universal.json").is_file()
    for ours, theirs in zip(remote, local, strict=True):
        assert ours["run"]["start"] == theirs["run"]["start"]
        assert ours["run"]["losses"] == theirs["run"]["losses"]


@pytest.fixture(scope="module")
def two_checkpoints(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one worker with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    run_legs({"checkpoints": train_spec()}, dataset, folder, [(1, 2), (1, 4)])
    return folder


def copied(folder: Path, target: Path) -> CheckpointStore:
    Location.parse(target).upload(folder / "checkpoints")
    return CheckpointStore(Location.parse(target), keep=2)


def biggest_file(checkpoint: Path) -> Path:
    return max(checkpoint.rglob("*.pt"), key=lambda file: file.stat().st_size)


def truncate(checkpoint: Path) -> None:
    file = biggest_file(checkpoint)
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(checkpoint: Path) -> None:
    file = biggest_file(checkpoint)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def flip_in_manifest(checkpoint: Path) -> None:
    file = checkpoint / "manifest.json"
    record = json.loads(file.read_text())
    record["world_size"] += 1
    file.write_text(json.dumps(record))


def truncate_manifest(checkpoint: Path) -> None:
    file = checkpoint / "manifest.json"
    file.write_text(file.read_text()[:-40])


def lose_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def lose_a_file(checkpoint: Path) -> None:
    biggest_file(checkpoint).unlink()


DAMAGES = {
    truncate: r"bytes instead of",
    flip_a_bit: r"the checksum of its deepspeed/.* is wrong",
    flip_in_manifest: r"its manifest.json is damaged",
    truncate_manifest: r"its manifest.json is damaged",
    lose_manifest: r"never finished",
    lose_a_file: r"deepspeed/.* is missing",
}


def find_alone(
    rank: int, num_workers: int, spec: TrainSpec, output: Location, result: Path
) -> None:
    from pipeline.training.checkpoint import find_newest

    said: list[str] = []
    for case in output.children():
        store = CheckpointStore(case, keep=2)
        with tempfile.TemporaryDirectory() as cache:
            try:
                found = find_newest(store, spec, rank, num_workers, Path(cache), said.append)
                said.append(f"step {found.state.step}" if found else "none")
            except UserError as error:
                said.append(error.message)
    result.write_text(json.dumps(said))


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.short
def test_torn_checkpoint_is_named_and_the_one_before_is_used(
    two_checkpoints: Path, tmp_path: Path
) -> None:
    for number, damage in enumerate(DAMAGES):
        copied(two_checkpoints, tmp_path / "cases" / str(number))
        damage(tmp_path / "cases" / str(number) / checkpoint_name(4))
    both = tmp_path / "cases" / str(len(DAMAGES))  # one more, with nothing whole in it
    copied(two_checkpoints, both)
    for step in (2, 4):
        flip_a_bit(both / checkpoint_name(step))
    result = tmp_path / "said.json"
    cases = Location.parse(tmp_path / "cases")
    start_processes(find_alone, 1, train_spec(), cases, result)
    said = json.loads(result.read_text())
    for number, reason in enumerate(DAMAGES.values()):
        warning, step = said[2 * number : 2 * number + 2]
        torn = tmp_path / "cases" / str(number) / checkpoint_name(4)
        assert warning.startswith(f"warning: the checkpoint {torn} is torn (")
        assert re.search(reason, warning), warning
        assert step == "step 2"
        assert not torn.exists()
    assert said[-1].startswith("none of the run's checkpoints can be read")
    assert "\n" not in said[-1]


def test_prune_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(Location.parse(tmp_path), keep=2)
    for step, value in enumerate([None, 5.0, 3.0, 3.0, 4.0, 6.0, 7.0], start=1):
        stored(store, step, value)
    assert store.steps() == [7, 6, 3]  # of two as good, the one nearer to its validation
    assert store.whole_steps() == [7, 6, 3]


def test_manifest_of_another_step_is_torn(tmp_path: Path) -> None:
    store = CheckpointStore(Location.parse(tmp_path), keep=2)
    stored(store, 3, None)
    (store / 3).move_to(store / 4)
    with pytest.raises(TornCheckpointError, match="that of step 3"):
        store.manifest(4)


def test_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    from pipeline.artifact import digest

    record = {"format": 99, "step": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(record | {"digest": digest(record)}))
    with pytest.raises(UserError, match="another format than 2"):
        Manifest.load(Location.parse(tmp_path / "manifest.json"))


def test_upload_to_object_storage_is_whole_and_damage_is_found(tmp_path: Path) -> None:
    from pipeline.training.store import verified
    from pipeline.training.upload import Uploader
    from tests.jobs.s3_server import s3_server

    with s3_server():
        store = CheckpointStore(Location.parse("s3://bucket/run/checkpoints"), keep=1)
        uploaders = [Uploader(store, rank, 2, "attempt", committed=0) for rank in range(2)]
        for step in (3, 4):
            for rank, uploader in enumerate(uploaders):
                scratch = tmp_path / f"{rank}-{step}"
                (scratch / "deepspeed").mkdir(parents=True)
                (scratch / "deepspeed" / str(rank)).write_bytes(bytes([rank, step]) * 3_000_000)
                uploader.submit(scratch, Manifest(step, 2, 2, None, {}))
            for uploader in uploaders:
                uploader.wait()
        for uploader in uploaders:
            uploader.close()
        assert store.whole_steps() == [4]
        assert not (tmp_path / "0-4").exists()
        manifest = store.manifest(4)
        assert sorted(manifest.files) == ["deepspeed/0", "deepspeed/1"]
        folder = verified(store / 4, manifest.files, tmp_path / "cache")
        assert (folder / "deepspeed" / "1").read_bytes() == bytes([1, 4]) * 3_000_000
        damaged = store / 4 / "deepspeed" / "0"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
        with pytest.raises(TornCheckpointError, match="checksum of its deepspeed/0 is wrong"):
            verified(store / 4, store.manifest(4).files, tmp_path / "other")


def test_part_of_an_attempt_that_died_does_not_count(tmp_path: Path) -> None:
    from pipeline.training.store import all_parts, store_part

    folder = Location.parse(tmp_path)
    store_part(folder, "dead", 1, {"b": StoredFile(1, "x")})
    store_part(folder, "new", 0, {"a": StoredFile(1, "y")})
    with pytest.raises(TimeoutError, match="rank 1 has not stored"):
        all_parts(folder, "new", 2, lambda: False)
    store_part(folder, "new", 1, {"b": StoredFile(1, "z")})
    assert all_parts(folder, "new", 2, lambda: False)["b"].sha256 == "z"
