"""The preprocess stage on a real Ray: the same shards however it runs, whatever interrupts it."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpora import index_corpus
from pipeline.errors import UserError
from pipeline.runner import plan, run_stage
from pipeline.shards import MANIFEST, Dataset
from pipeline.specs import PreprocessSpec
from pipeline.stages.preprocess import run_preprocess
from pipeline.storage import Location
from tests.guards import HANG_S
from tests.pipeline.preprocess_data import make_lines, make_spec, tree, write_dataset, write_lines

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def _run(spec: PreprocessSpec, folder: Path) -> dict[str, Any]:
    return run_preprocess(spec, {}, Location.parse(folder))


def _drive(spec: PreprocessSpec, folder: Path, num_cpus: int) -> subprocess.Popen[bytes]:
    """Start a driver process with a Ray of its own."""
    config = folder.parent / f"{folder.name}.json"
    values = spec.model_dump(mode="json") | {"cluster": {"num_cpus": num_cpus}}
    config.write_text(json.dumps(values))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.pipeline.drive_preprocess", str(config), str(folder)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
    )


def test_preprocess_on_ray_writes_what_one_process_writes(tmp_path: Path, ray_local: None) -> None:
    files = {
        "train": write_lines(tmp_path / "a.txt", [*make_lines(900, 1), "", "  "]),
        "valid": write_lines(tmp_path / "b.txt", make_lines(90, 2)),
    }
    spec = make_spec(files)
    figures = _run(spec, tmp_path / "ray")
    write_dataset(spec, tmp_path / "plain")
    assert tree(tmp_path / "ray") == tree(tmp_path / "plain")
    assert figures["train"]["documents"] == 900
    assert figures["train"]["words"] == sum(len(line.split()) for line in make_lines(900, 1))
    assert figures["valid"]["documents"] == 90
    assert figures["blank"] == 2
    assert figures["rows_per_s"] > 0
    assert figures["tokens_per_s"] > 0


def test_preprocess_one_cpu_and_four_write_the_same(tmp_path: Path, ray_local: None) -> None:
    spec = make_spec({"train": write_lines(tmp_path / "a.txt", make_lines(600))})
    driver = _drive(spec, tmp_path / "one", num_cpus=1)
    _run(spec, tmp_path / "four")
    assert driver.wait(timeout=HANG_S) == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "four")


def test_preprocess_again_doubles_nothing(tmp_path: Path, ray_local: None) -> None:
    spec = make_spec({"train": write_lines(tmp_path / "a.txt", make_lines(300))})
    first = run_stage(plan("preprocess", spec, {}, Location.parse(tmp_path / "runs")))
    folder = Path(first.folder.path)
    before = tree(folder)
    again = run_stage(plan("preprocess", spec, {}, Location.parse(tmp_path / "runs")))
    assert again == first
    figures = _run(spec, folder)
    assert figures["train"] == first.figures["train"]
    assert figures["rows_per_s"] is None
    assert tree(folder) == before


@pytest.mark.faults
def test_preprocess_driver_killed_leaves_no_half_dataset_and_goes_on(
    tmp_path: Path, ray_local: None
) -> None:
    lines = make_lines(20_000)
    lines[7] = "nul \0"
    spec = make_spec({"train": write_lines(tmp_path / "a.txt", lines)})
    folder = tmp_path / "killed"
    driver = _drive(spec, folder, num_cpus=1)
    try:
        deadline = time.monotonic() + HANG_S
        while len(list((folder / "units").glob("0*.json"))) < 5:
            assert driver.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(driver.pid, signal.SIGKILL)
    finally:
        driver.kill()
        driver.wait()
    _wait_until_still(folder)
    with pytest.raises(UserError, match="was interrupted"):
        Dataset.open(Location.parse(folder))
    records = [json.loads(f.read_text()) for f in (folder / "units").glob("0*.json")]
    finished = [part["file"] for record in records for part in record["parts"].values()]
    written = {name: (folder / name).stat().st_mtime_ns for name in finished}
    (folder / "train" / "part-00099.parquet.dead.tmp").write_bytes(b"what a dead task left")
    damaged = folder / finished[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])

    _run(spec, folder)
    write_dataset(spec, tmp_path / "straight")
    assert tree(folder) == tree(tmp_path / "straight")
    assert Dataset.open(Location.parse(folder)).manifest["rejected"] == {"NUL byte": 1}
    redone = [name for name in finished if (folder / name).stat().st_mtime_ns != written[name]]
    number = finished[0][-len("00000.parquet") :]
    assert redone
    assert all(name.endswith(number) for name in redone), "only the damaged unit is done again"


def _wait_until_still(folder: Path) -> None:
    """Wait for the workers of a killed driver to be gone."""
    before: dict[str, str] = {"nothing": "yet"}
    while (now := tree(folder)) != before:
        before = now
        time.sleep(2)


def _write_bad(kind: str, file: Path, good: list[str]) -> None:
    texts: list[Any] = [*good]
    if kind == "jsonl":
        lines = [json.dumps({"text": text}) for text in texts]
        lines[3] = '{"text": 5}'
        file.write_text("\n".join(lines))
    elif kind == "csv":
        with file.open("w", newline="") as out:
            csv.writer(out).writerows([["text"], *([text] for text in texts)])
            out.write('"bad" row\n')
    elif kind == "parquet":
        pq.write_table(pa.table({"text": [*texts, None]}), file, row_group_size=100)
    elif kind == "hf":
        datasets.Dataset.from_dict({"text": [*texts, "nul \0"]}).save_to_disk(str(file))
    else:
        raw = "\n".join(texts).encode() + b"\nbad \xff\n"
        file.write_bytes(gzip.compress(raw) if kind == "gz" else raw)


@pytest.mark.parametrize("kind", ["text", "gz", "jsonl", "csv", "parquet", "hf"])
def test_preprocess_each_kind_counts_documents_and_rejected(
    tmp_path: Path, ray_local: None, kind: str
) -> None:
    good = make_lines(400)
    suffix = "txt.gz" if kind == "gz" else kind
    file = tmp_path / f"a.{suffix}"
    _write_bad(kind, file, good)
    key = "path" if kind == "hf" else "train"
    corpus = {"kind": "text" if kind == "gz" else kind, key: str(file)}
    figures = _run(make_spec(corpus), tmp_path / "out")
    kept = 399 if kind == "jsonl" else 400
    splits = [figures[name] for name in ("train", "valid", "test")]
    assert sum(split["documents"] for split in splits) == kept
    expected = [text for i, text in enumerate(good) if kind != "jsonl" or i != 3]
    assert sum(split["words"] for split in splits) == sum(len(t.split()) for t in expected)
    assert sum(figures["rejected"].values()) == 1
    (rejected,) = (tmp_path / "out" / "rejected").iterdir()
    (record,) = map(json.loads, rejected.read_text().splitlines())
    assert set(record) == {"file", "line", "reason", "excerpt"}
    assert str(file) in record["file"]
    lines = {"csv": 402, "jsonl": 4}
    assert record["line"] == lines.get(kind, 401)


def test_preprocess_too_much_rejected_says_why_and_where(tmp_path: Path, ray_local: None) -> None:
    lines = make_lines(500)
    for i in (20, 40, 60, 80, 100, 120):
        lines[i] += "\0"
    lines[10] = "x" * 5_000_000
    file = write_lines(tmp_path / "a.txt", lines)
    with pytest.raises(UserError) as caught:
        _run(make_spec({"train": file}), tmp_path / "out")
    says = caught.value.message
    assert "corpus.max_rejected=0.01" in says
    # Units end in any order, and it stops as soon as there are too many.
    assert re.search(r"[67] of [\d,]+ documents( so far)? were rejected", says)
    assert re.search(rf"'NUL byte' \([56]\), for example at {file}:(21|41)", says)
    assert not (tmp_path / "out" / MANIFEST).exists()
    figures = _run(make_spec({"train": file, "max_rejected": 0.02}), tmp_path / "out")
    assert figures["rejected"] == {"NUL byte": 6, "longer than corpus.max_document_bytes": 1}


def test_preprocess_hopeless_corpus_stops_long_before_its_end(
    tmp_path: Path, ray_local: None
) -> None:
    lines = ["nul \0 in the first fifth"] * 5_000 + make_lines(20_000)
    file = write_lines(tmp_path / "a.txt", lines)
    spec = make_spec({"train": file}, shard_bytes=10_000)
    with pytest.raises(UserError, match="documents so far were rejected"):
        _run(spec, tmp_path / "out")
    _wait_until_still(tmp_path / "out")
    num_units = len(index_corpus(spec.corpus, spec.shard_bytes).units)
    finished = len(list((tmp_path / "out" / "units").glob("0*.json")))
    assert finished < num_units / 2, "the tasks that waited were called off"


@pytest.mark.parametrize(
    ("content", "says"),
    [(b" \n\n\t\n", "no document"), (b"\n" * 5_000, "no document")],
)
def test_preprocess_split_of_blank_lines_is_refused(
    tmp_path: Path, ray_local: None, content: bytes, says: str
) -> None:
    (tmp_path / "b.txt").write_bytes(content)
    train = write_lines(tmp_path / "a.txt", make_lines(100))
    with pytest.raises(UserError, match=r"corpus\.valid has no document left") as caught:
        _run(make_spec({"train": train, "valid": str(tmp_path / "b.txt")}), tmp_path / "out")
    assert "\n" not in caught.value.message
    with pytest.raises(UserError, match=says):
        _run(make_spec({"train": str(tmp_path / "b.txt")}), tmp_path / "out2")


def test_preprocess_damaged_source_met_by_a_task_is_one_sentence(
    tmp_path: Path, ray_local: None
) -> None:
    train = write_lines(tmp_path / "a.txt", make_lines(100))
    packed = tmp_path / "b.txt.gz"
    packed.write_bytes(gzip.compress("\n".join(make_lines(100)).encode())[:-20])
    with pytest.raises(UserError, match=r"b\.txt\.gz is no whole gzip file") as caught:
        _run(make_spec({"train": train, "valid": str(packed)}), tmp_path / "out")
    assert "\n" not in caught.value.message
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_preprocess_python_docs_needs_no_file(tmp_path: Path, ray_local: None) -> None:
    spec = make_spec(
        {"kind": "python_docs"}, tokenizer={"kind": "bpe", "vocab_size": 500}, shard_bytes=500_000
    )
    figures = _run(spec, tmp_path / "out")
    documents = {name: figures[name]["documents"] for name in ("train", "valid", "test")}
    total = sum(documents.values())
    assert total > 5_000
    assert 0.03 < documents["valid"] / total < 0.07
    assert 0.03 < documents["test"] / total < 0.07
    assert figures["vocab_size"] == 500
