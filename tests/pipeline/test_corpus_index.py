"""Finding the files of a corpus, and cutting them into units."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpora import index_corpus
from pipeline.corpora.files import find_files
from pipeline.errors import UserError
from pipeline.external import fingerprints as external_inputs
from pipeline.specs import CorpusSpec
from tests.pipeline.preprocess_data import make_lines, make_spec, write_lines


def _corpus(**values: Any) -> CorpusSpec:
    return CorpusSpec.build({"kind": "text"} | values)


@pytest.mark.parametrize("shard_bytes", [1_000, 1_777, 50_000])
@pytest.mark.parametrize("ending", ["\n", ""])
def test_index_byte_ranges_cover_the_file_in_whole_lines(
    tmp_path: Path, shard_bytes: int, ending: str
) -> None:
    lines = make_lines(500)
    file = tmp_path / "a.txt"
    file.write_text("\n".join(lines) + ending)
    raw = file.read_bytes()
    index = index_corpus(_corpus(train=str(file)), shard_bytes)
    assert b"".join(raw[slice(*u.span)] for u in index.units if u.span) == raw
    for unit in index.units:
        assert unit.span is not None
        assert unit.lines is not None
        first = raw[slice(*unit.span)].decode().split("\n")[0]
        assert lines[unit.first_line - 1] == first
        assert unit.lines >= raw[slice(*unit.span)].decode().rstrip("\n").count("\n") + 1
    assert index.files[0].sha256 == hashlib.sha256(raw).hexdigest()
    sizes = [unit.bytes for unit in index.units]
    assert max(sizes) - min(sizes) <= 2 * max(len(line.encode()) for line in lines) + len(sizes)


def test_index_line_longer_than_a_shard_stays_whole(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.txt", ["short", "x" * 9_000, "after"])
    units = index_corpus(_corpus(train=file), 1_000).units
    assert [unit.first_line for unit in units] == [1, 3]


def test_index_fingerprint_follows_content_and_split_not_path(tmp_path: Path) -> None:
    lines = make_lines(20)
    a, b = (
        write_lines(tmp_path / "a" / "x.txt", lines),
        write_lines(tmp_path / "b" / "y.txt", lines),
    )
    other = write_lines(tmp_path / "c.txt", [*lines[:-1], lines[-1][:-1] + "!"])

    def inputs(**corpus: str) -> dict[str, str]:
        return external_inputs(make_spec(corpus))

    assert inputs(train=a) == inputs(train=b)
    assert inputs(train=a) != inputs(train=other)
    both = inputs(train=a, valid=b)
    assert both["corpus.train"] != both["corpus.valid"]
    assert both["corpus.train"] != inputs(train=a)["corpus.train"], "else the hash would split it"


def test_index_rewritten_file_is_hashed_again(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.txt", ["one"])
    before = index_corpus(_corpus(train=file), 1_000).fingerprints
    write_lines(tmp_path / "a.txt", ["two"])
    assert index_corpus(_corpus(train=file), 1_000).fingerprints != before


def test_find_files_folder_takes_the_kinds_endings_and_names_the_rest(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt.gz", "README.md", ".hidden.txt", "_SUCCESS.txt"):
        write_lines(tmp_path / name, ["x"])
    found = find_files("corpus.train", str(tmp_path), "text")
    assert [file.name for file in found.files] == ["a.txt", "b.txt", "sub/c.txt.gz"]
    assert found.skipped == ["README.md"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["a1.txt", "a2.txt", "b1.txt"]),
        ("a?.txt", ["a1.txt", "a2.txt"]),
        ("[!a]*.txt", ["b1.txt"]),
        ("**/*.txt", ["a1.txt", "a2.txt", "b1.txt", "sub/deep/a3.txt"]),
        ("sub/*/a[23].txt", ["deep/a3.txt"]),
    ],
)
def test_find_files_glob_matches_as_a_shell_does(
    tmp_path: Path, pattern: str, expected: list[str]
) -> None:
    for name in ("a1.txt", "a2.txt", "b1.txt", "sub/deep/a3.txt", "c.csv"):
        write_lines(tmp_path / name, ["x"])
    found = find_files("corpus.train", f"{tmp_path}/{pattern}", "text")
    assert [file.name for file in found.files] == expected


def test_find_files_uri_reads_the_same_as_a_path(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.txt", ["x"])
    by_uri = find_files("corpus.train", f"file://{tmp_path}", "text")
    assert [f.name for f in by_uri.files] == ["a.txt"]


@pytest.mark.parametrize(
    ("make", "uri", "says"),
    [
        (None, "none.txt", "is not there"),
        (None, "*.txt", "matches no file"),
        ("folder/", "folder", "it holds no files"),
        ("folder/x.bin", "folder", "there is only x.bin"),
        ("empty.txt", "empty.txt", "the file is empty"),
    ],
)
def test_index_without_files_is_one_sentence(
    tmp_path: Path, make: str | None, uri: str, says: str
) -> None:
    if make:
        target = tmp_path / make
        (target if make.endswith("/") else target.parent).mkdir(exist_ok=True, parents=True)
        if not make.endswith("/"):
            target.touch()
    with pytest.raises(UserError, match=says) as caught:
        index_corpus(_corpus(train=f"{tmp_path}/{uri}"), 1_000)
    assert "\n" not in caught.value.message
    assert "corpus.train=" in caught.value.message


def test_index_parquet_cut_off_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": make_lines(100)}), file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"a\.parquet is no whole Parquet file"):
        index_corpus(_corpus(kind="parquet", train=str(file)), 1_000)


@pytest.mark.parametrize(
    ("column", "says"), [("txt", "did you mean 'txt'"), ("number", "holds int64")]
)
def test_index_parquet_without_a_text_column_names_the_columns(
    tmp_path: Path, column: str, says: str
) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"txt": ["a"], "number": [1]}), file)
    field = "number" if column == "number" else "text"
    with pytest.raises(UserError, match=says):
        index_corpus(_corpus(kind="parquet", train=str(file), text_field=field), 1_000)


def test_index_parquet_units_are_runs_of_row_groups(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": make_lines(1000)}), file, row_group_size=37)
    units = index_corpus(_corpus(kind="parquet", train=str(file)), 4_000).units
    assert len(units) > 3
    spans = [unit.span for unit in units]
    assert [s for span in spans if span for s in range(*span)] == list(range(28))
    assert sum(unit.lines or 0 for unit in units) == 1000
    assert units[1].first_line == 1 + (units[0].lines or 0)


def test_index_compressed_file_is_one_unit(tmp_path: Path) -> None:
    file = tmp_path / "a.txt.gz"
    file.write_bytes(gzip.compress("\n".join(make_lines(500)).encode()))
    (unit,) = index_corpus(_corpus(train=str(file)), 1_000).units
    assert unit.span is None
    assert unit.lines is None
