"""Training that is killed, stopped, starved and resized for real, and what it ends as.

The whole suite: pytest -m faults. What is marked `short` of it runs with all tests.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import Artifact, now
from pipeline.errors import UserError
from pipeline.shards import Dataset
from pipeline.specs import TrainSpec
from pipeline.storage import Location
from pipeline.training.metrics import read_rows
from pipeline.training.store import CHECKPOINTS, CheckpointStore
from tests.guards import HANG_S
from tests.jobs.s3_server import s3_server
from tests.pipeline.train_data import small_dataset, train_spec
from tests.pipeline.train_runs import (
    assert_same_run,
    await_,
    driver,
    has_step,
    resumable,
    run,
    worker_processes,
)

pytestmark = [pytest.mark.faults, pytest.mark.slow]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def straight(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Location:
    """An uninterrupted run on two workers."""
    output = Location.parse(tmp_path_factory.mktemp("straight"))
    run(resumable(), dataset, output)
    return output


def run_disturbed(
    spec: TrainSpec, dataset: Dataset, output: Location, disturb: Callable[[], None]
) -> dict[str, Any]:
    """Train while `disturb` runs beside it, which must come to its end."""
    failed: list[BaseException] = []

    def beside() -> None:
        try:
            disturb()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=beside)
    thread.start()
    figures = run(spec, dataset, output)
    thread.join()
    assert not failed, failed
    return figures


def checkpoints(output: Location) -> CheckpointStore:
    return CheckpointStore(output / CHECKPOINTS, keep=2)


@pytest.mark.short
def test_driver_killed_and_started_again_equals_the_straight_run(
    straight: Location, dataset: Dataset, tmp_path: Path
) -> None:
    output, spec = Location.parse(tmp_path / "run"), resumable()
    with driver(spec, dataset, output) as process:
        await_(lambda: has_step(output, 12), process)
    assert not (output / "summary.json").exists()
    run(spec, dataset, output)
    assert_same_run(output, straight)


def test_driver_told_to_stop_leaves_a_checkpoint_of_its_last_step(
    straight: Location, dataset: Dataset, tmp_path: Path
) -> None:
    output = Location.parse(tmp_path / "run")
    spec = resumable(train__checkpoint_every=1000, train__grace_s=120)
    with driver(spec, dataset, output) as process:
        await_(lambda: has_step(output, 10), process)  # the first validation; no checkpoint yet
        assert checkpoints(output).steps() == []
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=HANG_S)
    assert process.returncode != 0
    (step,) = checkpoints(output).whole_steps()
    assert f"interrupted at step {step} (stopped); the last good checkpoint is" in text
    run(spec, dataset, output)
    rows = [row["step"] for row in read_rows(output) if row["kind"] == "train"]
    assert rows == sorted({*range(3, 41, 3), 10, 20, 30, 40})
    # Rows at other steps than the straight run's, but the same weights.
    assert_same_run(output, straight, with_rows=False)


def kill_seeds() -> list[Any]:
    return [pytest.param(s, marks=[pytest.mark.short] if s == 0 else []) for s in range(20)]


@pytest.mark.parametrize("seed", kill_seeds())
def test_worker_killed_at_a_random_step_equals_the_straight_run(
    straight: Location, dataset: Dataset, tmp_path: Path, seed: int
) -> None:
    output, draw = Location.parse(tmp_path / "run"), random.Random(seed)

    def kill_one() -> None:
        step = draw.choice([5, 10, 15, 20, 25, 30])
        await_(lambda: has_step(output, step))
        time.sleep(draw.uniform(0.0, 0.4))  # in the middle of a step, or of an upload
        draw.choice(worker_processes()).send_signal(signal.SIGKILL)

    run_disturbed(resumable(), dataset, output, kill_one)
    assert_same_run(output, straight)


def test_worker_preempted_by_sigterm_loses_no_step_and_is_no_failure(
    straight: Location, dataset: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = Location.parse(tmp_path / "run")
    spec = resumable(train__max_failures=0, train__max_preemptions=1, train__grace_s=120)

    def preempt_one() -> None:
        await_(lambda: has_step(output, 10))
        worker_processes()[-1].send_signal(signal.SIGTERM)

    run_disturbed(spec, dataset, output, preempt_one)
    assert_same_run(output, straight)
    printed = capfd.readouterr().out
    assert "(preempted); the last good checkpoint is" in printed
    assert "workers were preempted (1 of 1, train.max_preemptions)" in printed


def test_driver_killed_while_a_checkpoint_is_written_equals_the_straight_run(
    straight: Location, dataset: Dataset, tmp_path: Path
) -> None:
    output, spec = Location.parse(tmp_path / "run"), resumable()
    store = checkpoints(output)

    def is_torn() -> bool:
        return len(store.steps()) > len(store.whole_steps())

    for _ in range(6):  # a kill may come as the last file does
        with driver(spec, dataset, output) as process:
            await_(is_torn, process, every_s=0.002)
        if is_torn():
            break
    assert is_torn(), "no kill came in the middle"
    run(spec, dataset, output)
    assert_same_run(output, straight)


def test_drained_node_is_a_preemption_that_loses_no_step(
    straight: Location, dataset: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    output = Location.parse(tmp_path / "run")
    spec = resumable(train__max_failures=0, train__max_preemptions=1, train__grace_s=60)
    node = {"num_cpus": 1, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    for _ in range(2):  # one for the second worker, one in reserve
        cluster.add_node(**node)

    def drain_one() -> None:
        await_(lambda: has_step(output, 10))
        free = ray._private.state.available_resources_per_node()
        busy = [
            n.node_id
            for n in cluster.worker_nodes
            if free.get(n.node_id, {}).get("CPU", 0) < 1  # one of the workers is there
        ]
        subprocess.run(
            [
                str(Path(sys.executable).with_name("ray")), "drain-node",
                f"--address={cluster.address}", f"--node-id={busy[0]}",
                "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=a spot node is taken",
                "--deadline-remaining-seconds=120",
            ],
            check=True,
        )  # fmt: skip

    try:
        ray.init(address=cluster.address, log_to_driver=False)
        run_disturbed(spec, dataset, output, drain_one)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert_same_run(output, straight)
    assert "workers were preempted (1 of 1, train.max_preemptions)" in capfd.readouterr().out


def test_worker_that_hangs_is_found_and_restarted(
    straight: Location, dataset: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = Location.parse(tmp_path / "run")

    def stop_one() -> None:
        await_(lambda: has_step(output, 10))
        worker_processes()[-1].send_signal(signal.SIGSTOP)

    run_disturbed(resumable(train__step_timeout_s=20), dataset, output, stop_one)
    assert_same_run(output, straight)
    assert "has made no step for 20 s (train.step_timeout_s)" in capfd.readouterr().out


def test_faults_over_the_budget_end_the_run(dataset: Dataset, tmp_path: Path) -> None:
    output = Location.parse(tmp_path / "run")

    def kill_one() -> None:
        await_(lambda: has_step(output, 10))
        worker_processes()[0].send_signal(signal.SIGKILL)

    with pytest.raises(Exception, match=r"ended 1 times, but train.max_failures=0"):
        run_disturbed(resumable(train__max_failures=0), dataset, output, kill_one)
    assert checkpoints(output).whole_steps()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a run, and not for much more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=192m", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_that_fills_up_stops_with_one_sentence_and_a_whole_checkpoint(
    small_disk: Path, dataset: Dataset
) -> None:
    output = Location.parse(small_disk / "run")
    spec = train_spec(train__max_steps=400, train__checkpoint_every=2, train__eval_every=1000)
    filler = small_disk / "filler"

    def fill() -> None:
        await_(lambda: bool(checkpoints(output).whole_steps()))
        with filler.open("wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 20))
                    file.flush()
            except OSError:
                return

    with pytest.raises(UserError, match=r"disk of .* is full .*the last good checkpoint is") as e:
        run_disturbed(spec, dataset, output, fill)
    assert "\n" not in e.value.message
    (newest, *_) = checkpoints(output).whole_steps()
    assert checkpoints(output).manifest(newest).step == newest
    assert f"step-{newest:09d}" in e.value.message
    filler.unlink()
    figures = run(spec.model_copy(), dataset, output)
    assert figures["steps"] == 400


def test_driver_killed_on_object_storage_equals_the_straight_run(
    straight: Location, dataset: Dataset
) -> None:
    with s3_server():
        output, spec = Location.parse("s3://bucket/run"), resumable()
        with driver(spec, dataset, output) as process:
            await_(lambda: has_step(output, 12), process)
        run(spec, dataset, output)
        assert_same_run(output, straight)
        assert len(checkpoints(output).whole_steps()) >= 2


def test_two_drivers_on_one_run_train_once(dataset: Dataset, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    Artifact(dataset.folder, "preprocess", "5" * 64, {}, {}, "done", now(), now(), 1.0).save()
    command = [
        sys.executable, "jobs/train.py", f"dataset={dataset.folder}", f"storage={tmp_path}",
        "model=tiny", "model.context=64", "train.max_steps=30", "train.batch_tokens=512",
        "train.checkpoint_every=5", "train.eval_every=10",
    ]  # fmt: skip
    both = [
        subprocess.Popen(
            command, cwd=root, env=os.environ, stdout=subprocess.PIPE, text=True, stderr=sys.stderr
        )
        for _ in range(2)
    ]
    texts = [process.communicate(timeout=HANG_S)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len({text.strip().splitlines()[-1] for text in texts}) == 1
    assert sum("waiting for its result" in text for text in texts) == 1
    (output,) = (Location.parse(tmp_path) / "train").children()
    steps = [row["step"] for row in read_rows(output) if row["kind"] == "train"]
    assert steps == sorted(set(steps))
    assert (output / "artifact.json").read_json()["attempts"] == 1


def near(found: list[float], expected: list[float]) -> bool:
    return found == pytest.approx(expected, rel=2e-3)


def test_elastic_run_follows_the_cluster_up_and_down(dataset: Dataset, tmp_path: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    output = Location.parse(tmp_path / "run")
    spec = train_spec(
        train__num_workers=[1, 2],
        train__resize_every_s=1,
        train__max_steps=200,
        train__checkpoint_every=20,
        train__eval_every=50,
        train__log_every=10,
        train__micro_batch_tokens=128,
        train__grace_s=60,
    )
    node = {"num_cpus": 1, "object_store_memory": 100_000_000}
    # A node that is to end with this process sets signal handlers, which a thread cannot.
    cluster = Cluster(initialize_head=True, head_node_args=node, shutdown_at_exit=False)

    def resize() -> None:
        await_(lambda: has_step(output, 20))
        added = cluster.add_node(**node)
        await_(lambda: newest_world_size(output) == 2)
        cluster.remove_node(added, allow_graceful=False)
        await_(lambda: newest_world_size(output) == 1)

    try:
        ray.init(address=cluster.address, log_to_driver=False)
        figures = run_disturbed(spec, dataset, output, resize)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert figures["steps"] == 200
    rows = [row["step"] for row in read_rows(output) if row["kind"] == "train"]
    assert rows == list(range(10, 201, 10))
    fixed = Location.parse(tmp_path / "fixed")
    expected = run(spec.model_copy(update={"train": fixed_workers(spec, 1)}), dataset, fixed)
    losses, straight = (
        [row["loss"] for row in read_rows(folder) if row["kind"] == "train"]
        for folder in (output, fixed)
    )
    assert near(losses, straight)
    assert near([figures["last"]["negative_elbo"]], [expected["last"]["negative_elbo"]])


def fixed_workers(spec: TrainSpec, num_workers: int) -> Any:
    return spec.train.model_copy(update={"num_workers": num_workers})


def newest_world_size(output: Location) -> int:
    store = checkpoints(output)
    for step in store.whole_steps():
        try:
            return store.manifest(step).world_size
        except Exception:  # it is being deleted
            continue
    return 0
