"""Preprocess killed at each of its phases: the same command again ends with the same shards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.artifact import Artifact
from pipeline.shards import Dataset
from pipeline.storage import Location
from tests.guards import HANG_S
from tests.pipeline.kill_preprocess import POINTS
from tests.pipeline.preprocess_data import make_lines, tree, write_lines

pytestmark = [pytest.mark.faults, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
# What a run leaves beside the dataset: it differs by time and by how often it was begun.
BESIDE = ("artifact.json",)


def command(storage: Path, source: str, point: str | None = None) -> list[str]:
    program = ["jobs/preprocess.py"] if point is None else ["-m", "tests.pipeline.kill_preprocess"]
    return [
        sys.executable, *program, *([point] if point else []),
        "corpus=text", f"corpus.train={source}", "tokenizer=bpe", "tokenizer.vocab_size=300",
        "shard_bytes=20000", "cluster.num_cpus=2", f"storage={storage}",
    ]  # fmt: skip


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def dataset_in(storage: Path) -> Path:
    (folder,) = (storage / "preprocess").iterdir()
    return folder


def shards(folder: Path) -> dict[str, str]:
    return {k: v for k, v in tree(folder, without=BESIDE).items() if not k.startswith("lease/")}


def wait_until_still(folder: Path) -> None:
    before: dict[str, str] | None = None
    while (now := tree(folder)) != before:
        before = now
        time.sleep(2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    lines = make_lines(6_000)
    lines[7] = "nul \0"
    return write_lines(tmp_path_factory.mktemp("corpus") / "a.txt", lines)


@pytest.fixture(scope="module")
def straight(source: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    storage = tmp_path_factory.mktemp("straight")
    done = run(command(storage, source))
    assert done.returncode == 0, done.stderr
    return shards(dataset_in(storage))


@pytest.mark.parametrize("point", POINTS)
def test_preprocess_killed_goes_on_to_the_same_shards_without_doing_work_twice(
    source: str, straight: dict[str, str], tmp_path: Path, point: str
) -> None:
    if point == "while_clearing":  # something that has to be cleared away first
        run(command(tmp_path, source, "before_the_commit"))
        (dataset_in(tmp_path) / "train" / "part-00099.parquet.dead.tmp").write_bytes(b"half")
    killed = run(command(tmp_path, source, point))
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    wait_until_still(tmp_path)
    # While it indexed, there was nothing to put in any folder.
    folder = dataset_in(tmp_path) if (tmp_path / "preprocess").is_dir() else None
    finished = {}
    if folder is not None:
        assert Artifact.load(Location.parse(folder)).status == "running"
        marked = (folder / "units" / "tokenizer.json").is_file()
        kept = [folder / "tokenizer" / "tokenizer.json"] if marked else []
        kept += [f for f in folder.glob("*/part-*.parquet") if has_record(folder, f)]
        finished = {file: file.stat().st_mtime_ns for file in kept}
        if list(POINTS).index(point) >= list(POINTS).index("while_writing_shards"):
            assert len(finished) >= 3

    again = run(command(tmp_path, source))
    assert again.returncode == 0, again.stdout + again.stderr
    folder = dataset_in(tmp_path)
    assert shards(folder) == straight
    assert Artifact.load(Location.parse(folder)).status == "done"
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    for name in ("train", "valid", "test"):
        Dataset.open(Location.parse(folder)).split(name).verify()


def has_record(folder: Path, part: Path) -> bool:
    number = part.name[len("part-") : -len(".parquet")]
    is_committed = (folder / "manifest.json").is_file()
    return is_committed or (folder / "units" / f"{number}.json").is_file()


def test_preprocess_worker_killed_is_replaced_and_the_shards_are_the_same(
    source: str, straight: dict[str, str], tmp_path: Path
) -> None:
    driver = subprocess.Popen(
        command(tmp_path, source), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        while not (units := list(tmp_path.glob("preprocess/*/units/0*.json"))):
            assert driver.poll() is None, "it ended before a worker could be killed"
            time.sleep(0.01)
        assert units
        workers = [pid for pid, name in below(driver.pid).items() if "UnitWriter" in name]
        assert workers
        os.kill(workers[0], signal.SIGKILL)
        output, _ = driver.communicate(timeout=HANG_S)
    finally:
        driver.kill()
    assert driver.returncode == 0, output.decode()
    assert shards(dataset_in(tmp_path)) == straight


def below(pid: int) -> dict[int, str]:
    """The processes that descend from one, with their command lines."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status = (folder / "stat").read_text().rsplit(")")[-1].split()
                parents[int(folder.name)] = int(status[1])
                names[int(folder.name)] = (folder / "cmdline").read_text()
            except (OSError, ValueError):
                continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {child: names.get(child, "") for child in found - {pid}}


def test_preprocess_shard_of_the_right_size_but_damaged_is_made_again(
    source: str, straight: dict[str, str], tmp_path: Path
) -> None:
    run(command(tmp_path, source, "before_the_commit"))
    folder = dataset_in(tmp_path)
    wait_until_still(tmp_path)
    part = next(iter(sorted(folder.glob("train/part-*.parquet"))))
    part.write_bytes(bytes(part.stat().st_size))  # as a power cut may leave it
    record = folder / "units" / "00001.json"
    record.write_bytes(b"")
    (folder / "units" / "tokenizer.json").write_bytes(b"")
    again = run(command(tmp_path, source))
    assert again.returncode == 0, again.stdout + again.stderr
    assert shards(folder) == straight
