"""Shards, written and read: counts against plain Python, checksums, damage, order."""

from __future__ import annotations

import gzip
import json
import pickle
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from pipeline.corpora import writing
from pipeline.corpora.writing import HashSplit, document_id
from pipeline.errors import UserError
from pipeline.shards import MANIFEST, SCHEMA, Dataset, Documents
from pipeline.storage import Location
from pipeline.tokenization import fingerprint_tokenizer, load_tokenizer, train_bpe
from tests.pipeline.preprocess_data import (
    document_ids,
    make_lines,
    make_spec,
    tree,
    write_dataset,
    write_lines,
)


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[str]]:
    return {"train": make_lines(997, 1), "valid": make_lines(101, 2), "test": make_lines(53, 3)}


@pytest.fixture(scope="module")
def dataset(corpus: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("shards")
    files = {name: write_lines(folder / f"{name}.txt", lines) for name, lines in corpus.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "_GROUP_ROWS", 7)
        return write_dataset(make_spec(files), folder / "out")


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_split_holds_what_plain_python_finds(
    dataset: Dataset, corpus: dict[str, list[str]], name: str
) -> None:
    lines = corpus[name]
    tokenizer = load_tokenizer(dataset.tokenizer_folder).backend_tokenizer
    expected = [[0, *tokenizer.encode(line).ids, 1] for line in lines]
    split = dataset.split(name)
    found = [ids.tolist() for i in range(len(split.row_groups)) for ids in split.read_row_group(i)]
    assert found == expected
    assert split.lengths().tolist() == [len(ids) for ids in expected]
    assert split.lengths().dtype == np.int32
    assert split.num_words_per_document().tolist() == [len(line.split()) for line in lines]
    assert document_ids(split) == [document_id(line) for line in lines]
    assert split.num_documents == len(lines)
    assert split.num_tokens == sum(map(len, expected))
    assert split.num_predicted_tokens == sum(len(ids) - 1 for ids in expected)
    assert split.num_words == sum(len(line.split()) for line in lines)
    assert split.max_length == max(map(len, expected))


def test_row_groups_load_alone_in_any_order(dataset: Dataset) -> None:
    split = dataset.split("train")
    lengths = split.lengths()
    groups = list(enumerate(split.row_groups))
    assert len({group.part_index for _, group in groups}) > 5
    random.Random(0).shuffle(groups)
    for index, group in groups:
        documents = split.read_row_group(index)
        rows = slice(group.first_document, group.first_document + group.num_rows)
        assert documents.lengths.tolist() == lengths[rows].tolist()
        part = dataset.folder / split.parts[group.part_index].file
        stored = pq.ParquetFile(part.path).metadata.row_group(group.row_group_index).num_rows
        assert stored == group.num_rows


def test_parts_keep_the_schema_and_their_record(dataset: Dataset) -> None:
    for part in dataset.split("train").parts:
        file = pq.ParquetFile((dataset.folder / part.file).path)
        assert file.schema_arrow.equals(SCHEMA)
        assert file.metadata.num_rows == part.documents == sum(part.row_groups)
        assert file.metadata.row_group(0).column(1).compression == "ZSTD"
        assert "BYTE_STREAM_SPLIT" in file.metadata.row_group(0).column(1).encodings
    dataset.split("train").verify()


def test_manifest_names_inputs_tokenizer_and_versions(
    dataset: Dataset, corpus: dict[str, list[str]]
) -> None:
    manifest = dataset.manifest
    assert [file["name"] for file in manifest["inputs"]] == ["train.txt", "valid.txt", "test.txt"]
    assert all(set(f) == {"split", "name", "bytes", "sha256"} for f in manifest["inputs"])
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    assert dataset.tokenizer_fingerprint == fingerprint_tokenizer(tokenizer)
    assert manifest["tokenizer"]["vocab_size"] == len(tokenizer)
    assert {"python", "pyarrow", "tokenizers"} <= set(manifest["versions"])
    assert manifest["rejected"] == {}
    assert str(Path(dataset.folder.path).parent) not in json.dumps(manifest), "no paths"


def test_split_travels_to_workers(dataset: Dataset) -> None:
    split = pickle.loads(pickle.dumps(dataset.split("valid")))
    assert split.lengths().tolist() == dataset.split("valid").lengths().tolist()


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_shards_do_not_depend_on_the_order_of_the_units(tmp_path: Path, order: str) -> None:
    file = write_lines(tmp_path / "a.txt", make_lines(800))
    spec = make_spec({"train": file, "valid_fraction": 0.2, "test_fraction": 0.1})

    def rearranged(units: list[Any]) -> list[Any]:
        if order == "reversed":
            return units[::-1]
        return random.Random(1).sample(units, len(units))

    write_dataset(spec, tmp_path / "straight")
    write_dataset(spec, tmp_path / "other", rearranged)
    assert tree(tmp_path / "straight") == tree(tmp_path / "other")


def test_shards_on_object_storage_are_the_same(tmp_path: Path) -> None:
    lines = make_lines(500)
    lines[3] += "\0"
    spec = make_spec({"train": write_lines(tmp_path / "a.txt", lines)})
    (tmp_path / "bucket").mkdir()
    bucket = fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem())
    dataset = write_dataset(spec, Location(bucket, "data", "mock"))  # not local: nothing is moved
    write_dataset(spec, tmp_path / "plain")
    assert tree(tmp_path / "bucket" / "data") == tree(tmp_path / "plain")
    dataset.split("train").verify()
    assert dataset.split("train").lengths().sum() == dataset.split("train").num_tokens


def test_split_by_hash_is_stable_and_keeps_duplicates_together(tmp_path: Path) -> None:
    lines = make_lines(2000)
    doubled = lines + lines[:700]
    random.Random(0).shuffle(doubled)
    spec = {"valid_fraction": 0.1, "test_fraction": 0.2}
    once = write_lines(tmp_path / "once.txt", lines)
    twice = write_lines(tmp_path / "twice.txt", doubled)
    small = write_dataset(make_spec({"train": once, **spec}), tmp_path / "small")
    large = write_dataset(
        make_spec({"train": twice, **spec}, shard_bytes=5_000), tmp_path / "large"
    )
    where: dict[str, str] = {}
    for name in ("train", "valid", "test"):
        for document in document_ids(large.split(name)):
            assert where.setdefault(document, name) == name
        assert set(document_ids(small.split(name))) == set(document_ids(large.split(name)))
    assert len(where) == 2000
    assert 150 < small.split("valid").num_documents < 250
    assert 330 < small.split("test").num_documents < 470


def test_hash_split_keeps_fixed_values() -> None:
    assert document_id("a heron") == "dc7b21181dbc2d05d0ccc59f3b1f759d"
    split = HashSplit(valid_fraction=0.25, test_fraction=0.25)
    assert [split.of(f"{digit}{'0' * 31}") for digit in "03478bcf"] == [
        "test", "test", "valid", "valid", "train", "train", "train", "train",
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["flip", "cut", "missing"])
def test_verify_damaged_part_names_the_file(tmp_path: Path, how: str) -> None:
    file = write_lines(tmp_path / "a.txt", make_lines(300))
    split = write_dataset(make_spec({"train": file}), tmp_path / "out").split("train")
    split.verify()
    victim = tmp_path / "out" / split.parts[2].file
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    if how == "missing":
        victim.unlink()
    else:
        victim.write_bytes(raw if how == "flip" else raw[:-100])
    with pytest.raises(UserError, match=f"{victim}.*run preprocess again"):
        split.verify()
    if how != "flip":
        with pytest.raises(UserError, match=str(victim)):
            split.lengths()


def test_read_row_group_with_any_bit_flipped_is_refused_or_unharmed(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.txt", make_lines(300))
    split = write_dataset(make_spec({"train": file}), tmp_path / "out").split("train")
    victim = tmp_path / "out" / split.parts[0].file
    sound = victim.read_bytes()
    tokens = split.read_row_group(0).values.tolist()
    start = sound.index(b"\x28\xb5\x2f\xfd")  # the first page's zstd frame
    refused = 0
    for place in range(start, len(sound) - 8, 97):
        raw = bytearray(sound)
        raw[place] ^= 1 << (place % 8)
        victim.write_bytes(raw)
        with suppress(UserError):
            # What is read all the same is unharmed: the flip was in another column.
            assert split.read_row_group(0).values.tolist() == tokens
            continue
        refused += 1
    assert refused > 10


def test_open_without_a_manifest_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        Dataset.open(Location.parse(tmp_path))
    (tmp_path / MANIFEST).write_text('{"format": 99}')
    with pytest.raises(UserError, match="another format"):
        Dataset.open(Location.parse(tmp_path))


def test_split_absent_names_those_there_are(tmp_path: Path) -> None:
    files = {n: write_lines(tmp_path / f"{n}.txt", make_lines(9)) for n in ("train", "valid")}
    dataset = write_dataset(make_spec(files), tmp_path / "out")
    assert dataset.split_names == ["train", "valid"]
    with pytest.raises(UserError, match="no documents in a split 'test': it has train, valid"):
        dataset.split("test")


def test_documents_iterate_and_index_alike() -> None:
    documents = Documents(np.arange(5, dtype=np.int32), np.array([0, 2, 2, 5]))
    assert [d.tolist() for d in documents] == [[0, 1], [], [2, 3, 4]]
    assert documents[2].tolist() == [2, 3, 4]
    assert documents.lengths.tolist() == [2, 0, 3]
    with pytest.raises(IndexError):
        documents[3]


def test_document_longer_than_max_tokens_is_rejected_with_its_line(tmp_path: Path) -> None:
    lines = make_lines(400)
    lines[311] = "heron " * 500
    file = write_lines(tmp_path / "a.txt", lines)
    spec = make_spec({"train": file, "max_tokens": 400, "valid_fraction": 0, "test_fraction": 0})
    dataset = write_dataset(spec, tmp_path / "out")
    assert dataset.manifest["rejected"] == {"longer than corpus.max_tokens": 1}
    (name,) = dataset.manifest["rejected_files"]
    (record,) = map(json.loads, (tmp_path / "out" / name).read_text().splitlines())
    assert (record["file"], record["line"]) == (file, 312)
    assert record["excerpt"].startswith("heron heron")
    assert dataset.split("train").num_documents == 399
    assert dataset.split("train").max_length <= 400


@pytest.mark.parametrize("group_tokens", [1, 1 << 30])
def test_unit_that_fails_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_tokens: int
) -> None:
    file = tmp_path / "a.txt.gz"
    file.write_bytes(gzip.compress("\n".join(make_lines(90_000)).encode())[:-50])
    monkeypatch.setattr(writing, "_GROUP_TOKENS", group_tokens)
    train_bpe([make_lines(50)], 300).save_pretrained(tmp_path / "bpe")
    spec = make_spec({"train": str(file)}, tokenizer={"kind": "hf", "path": str(tmp_path / "bpe")})
    with pytest.raises(UserError, match="no whole gzip file"):
        write_dataset(spec, tmp_path / "out")
    left = [f.name for f in (tmp_path / "out").rglob("*") if f.is_file()]
    assert "tokenizer.json" in left
    assert not [name for name in left if "part-" in name or name == MANIFEST]
