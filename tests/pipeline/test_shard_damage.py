"""Shards and manifests damaged after they were written: found before anything is built on them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.shards import MANIFEST, Dataset
from pipeline.storage import Location
from tests.pipeline.preprocess_data import make_lines, make_spec, write_dataset, write_lines

FLIPS = 150


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    file = write_lines(folder / "a.txt", make_lines(200))
    write_dataset(make_spec({"train": file}), folder / "out")
    return folder / "out"


@pytest.fixture
def damaged(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "out")
    return tmp_path / "out"


def content(folder: Path) -> list[Any]:
    """All that training reads of a dataset."""
    dataset = Dataset.open(Location.parse(folder))
    found: list[Any] = []
    for name in dataset.split_names:
        split = dataset.split(name)
        found += [name, split.lengths().tolist()]
        for index in range(len(split.row_groups)):
            found.append([ids.tolist() for ids in split.read_row_group(index)])
    return found


def _flipped(data: bytes, position: int, rng: random.Random) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :]


def test_shard_with_a_flipped_bit_is_refused_or_reads_the_same(good: Path, damaged: Path) -> None:
    expected = content(good)
    part = next(damaged.glob("train/part-*.parquet"))
    data, rng = part.read_bytes(), random.Random(0)
    refused: list[str] = []
    for _ in range(FLIPS):
        part.write_bytes(_flipped(data, rng.randrange(len(data)), rng))
        try:
            assert content(damaged) == expected
        except UserError as error:
            refused.append(error.message)
    assert all(part.name in message and "\n" not in message for message in refused)
    assert len(refused) > FLIPS / 2


@pytest.mark.parametrize("left", [0, 1, 0.3, 0.9, -1])
def test_shard_that_is_truncated_is_refused_by_name(damaged: Path, left: float) -> None:
    part = next(damaged.glob("train/part-*.parquet"))
    data = part.read_bytes()
    part.write_bytes(data[: int(left * len(data)) if isinstance(left, float) else left])
    with pytest.raises(UserError, match=part.name) as caught:
        content(damaged)
    assert "\n" not in caught.value.message


def test_manifest_with_a_flipped_bit_is_refused_or_says_the_same(damaged: Path) -> None:
    file = damaged / MANIFEST
    data, rng = file.read_bytes(), random.Random(1)
    whole = json.loads(data)
    del whole["checksum"]
    refused: list[str] = []
    for _ in range(FLIPS):
        file.write_bytes(_flipped(data, rng.randrange(len(data)), rng))
        try:
            manifest = Dataset.open(Location.parse(damaged)).manifest
            assert {key: manifest[key] for key in whole} == whole
        except UserError as error:
            refused.append(error.message)
    assert all(MANIFEST in message and "\n" not in message for message in refused)
    assert len(refused) > FLIPS * 0.9


def test_manifest_that_is_truncated_is_refused(damaged: Path) -> None:
    file = damaged / MANIFEST
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="should hold JSON"):
        Dataset.open(Location.parse(damaged))
