"""Documents out of files of every kind; what cannot be taken, with line and reason."""

from __future__ import annotations

import csv
import gzip
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpora import index_corpus
from pipeline.corpora.reading import count_words, read_unit
from pipeline.corpora.units import Batch, Limits
from pipeline.errors import UserError
from pipeline.specs import CorpusSpec
from tests.pipeline.preprocess_data import make_lines

LONG = "longer than corpus.max_document_bytes"


def _read(kind: str, file: Path, shard_bytes: int = 1_000, **corpus: Any) -> Batch:
    """Everything in a corpus of one file, as one batch."""
    key = "path" if kind == "hf" else "train"
    spec = CorpusSpec.build({"kind": kind, key: str(file), **corpus})
    limits = Limits(spec.text_field, spec.max_document_bytes)
    whole = Batch([], [], [])
    lines: list[int] = []
    blank = 0
    for unit in index_corpus(spec, shard_bytes).units:
        for batch in read_unit(unit, limits):
            whole.texts.extend(batch.texts)
            whole.num_words.extend(batch.num_words)
            whole.rejected.extend(batch.rejected)
            lines += batch.lines
            blank += batch.blank
    return Batch(whole.texts, lines, whole.num_words, whole.rejected, blank)


def _rejected(batch: Batch) -> list[tuple[int, str]]:
    return [(rejection.line, rejection.reason) for rejection in batch.rejected]


def _write_as(kind: str, file: Path, texts: list[str]) -> None:
    if kind == "text":
        raw = "".join(text + "\n" for text in texts).encode()
    elif kind == "jsonl":
        raw = "".join(json.dumps({"id": 1, "text": t}) + "\n" for t in texts).encode()
    elif kind == "csv":
        plain = file.with_suffix(".tmp")
        with plain.open("w", newline="") as out:
            csv.writer(out).writerows([("id", "text"), *enumerate(texts)])
        raw = plain.read_bytes()
    else:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": texts}), sink, row_group_size=50)
        raw = sink.getvalue().to_pybytes()
    file.write_bytes(gzip.compress(raw) if file.suffix == ".gz" else raw)


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "csv"])
def test_read_any_kind_gives_all_documents_in_order(tmp_path: Path, kind: str, packed: str) -> None:
    texts = make_lines(700)
    if kind != "text":
        texts[5] = 'two\nlines, and a "quote"'
    file = tmp_path / f"a.{kind}{packed}"
    _write_as(kind, file, texts)
    batch = _read(kind, file)
    assert batch.texts == texts
    assert batch.num_words == [len(text.split()) for text in texts]
    assert not batch.rejected


def test_read_text_rejects_each_fault_with_its_line_across_ranges(tmp_path: Path) -> None:
    lines = [line.encode() for line in make_lines(1000)]
    lines[10], lines[400], lines[401] = b"bad \xff\xfe here", b"nul \0 here", b"  \t "
    lines[700], lines[999] = b"y" * 3_000, b"cut \xe2\x82"
    file = tmp_path / "a.txt"
    file.write_bytes(b"\n".join(lines))
    batch = _read("text", file, max_document_bytes=2_500)
    assert _rejected(batch) == [
        (11, "invalid UTF-8"),
        (401, "NUL byte"),
        (701, LONG),
        (1000, "invalid UTF-8"),
    ]
    assert batch.blank == 1
    good = [i for i in range(1000) if i not in (10, 400, 401, 700, 999)]
    assert batch.lines == [i + 1 for i in good]
    assert batch.texts == [lines[i].decode() for i in good]


def test_read_line_of_5_mb_is_rejected_in_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"before\n" + b"word " * 40_000_000 + b"\nafter\n")
    tracemalloc.start()
    batch = _read("text", file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert _rejected(batch) == [(2, LONG)]
    assert batch.texts == ["before", "after"]
    assert batch.lines == [1, 3]
    assert peak < 40_000_000, "bytes, of a line of 200 MB"


def test_read_text_from_windows_loses_its_marks(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
    batch = _read("text", file)
    assert batch.texts == ["one", "two"]
    assert batch.lines == [1, 3]
    assert batch.blank == 1


def test_read_text_keeps_separators_that_end_no_line(tmp_path: Path) -> None:
    texts = ["a\x0bb", "c\u2028d", "e\x85f\x1cg"]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    assert _read("text", tmp_path / "a.txt").texts == texts


def test_read_jsonl_rejects_each_fault_with_its_line(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}', b'{"text": "broken', b'{"other": 1}', b'{"text": 5}', b"[1]", b"",
        b'{"text": null}', b'{"text": "nul \\u0000"}', b'{"text": "half \\ud800"}',
        b'{"text": "bad \xff"}', b"[" * 100_000, b'{"text": "  "}', b'{"text": "last"}',
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    batch = _read("jsonl", tmp_path / "a.jsonl")
    assert batch.texts == ["good", "last"]
    assert batch.lines == [1, 13]
    assert batch.blank == 2
    assert _rejected(batch) == [
        (2, "broken JSON"), (3, "no field 'text'"), (4, "field 'text' is not a string"),
        (5, "not a JSON object"), (7, "no field 'text'"), (8, "NUL byte"), (9, "invalid UTF-8"),
        (10, "invalid UTF-8"), (11, "broken JSON"),
    ]  # fmt: skip
    json.dumps([rejection.excerpt for rejection in batch.rejected]).encode()


def test_count_words_is_that_of_split_for_every_white_space() -> None:
    rng = random.Random(0)
    alphabet = ["a", "bc", " ", "  ", "\t", "\n", "\x1c", "\x85", "\xa0", "é", "\u2003", "\0", "猫"]
    texts = ["".join(rng.choices(alphabet, k=rng.randint(0, 12))) for _ in range(2000)]
    assert count_words(texts) == [len(text.split()) for text in texts]
    assert count_words([]) == []
    assert count_words([""]) == [0]


def test_read_csv_rejects_each_fault_with_its_line(tmp_path: Path) -> None:
    raw = (
        b'id,text\n1,"two\nlines"\n2\n3,"bad" quote\n4,\xff\n\n5,nul \0\n6,good\n7,"'
        + b"z" * 2_000
        + b'"\n'
    )
    (tmp_path / "a.csv").write_bytes(raw)
    batch = _read("csv", tmp_path / "a.csv", max_document_bytes=1_500)
    assert batch.texts == ["two\nlines", "good"]
    assert batch.lines == [2, 9]
    assert batch.blank == 1
    assert _rejected(batch) == [
        (4, "no field 'text'"), (5, "broken CSV row"), (6, "invalid UTF-8"), (8, "NUL byte"),
        (10, LONG),
    ]  # fmt: skip


def test_read_csv_quote_never_closed_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\nfine\n"open\nfor\never\n')
    with pytest.raises(UserError, match="begins on line 3 has a quote that is never closed"):
        _read("csv", tmp_path / "a.csv")


def test_read_csv_without_the_column_names_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,texts\n1,x\n")
    with pytest.raises(UserError, match=r"no column 'text' \(did you mean 'texts'\?\)"):
        _read("csv", tmp_path / "a.csv")


def test_read_parquet_rejects_nulls_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    raw = pa.array([b"good", None, b"bad \xff", b"nul \0", b" "] * 30, pa.binary())
    column = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=50)
    batch = _read("parquet", tmp_path / "a.parquet")
    assert batch.texts == ["good"] * 30
    assert batch.blank == 30
    assert _rejected(batch)[-3:] == [
        (147, "no field 'text'"), (148, "invalid UTF-8"), (149, "NUL byte"),
    ]  # fmt: skip


def test_read_parquet_dictionary_column_is_text(tmp_path: Path) -> None:
    column = pa.array(["a b", "c", "a b"]).dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert _read("parquet", tmp_path / "a.parquet").texts == ["a b", "c", "a b"]


def test_read_parquet_page_damaged_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": make_lines(5000)}), file, compression="zstd")
    raw = bytearray(file.read_bytes())
    raw[200:2200] = bytes(2000)
    file.write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.parquet is no whole Parquet file"):
        _read("parquet", file)


@pytest.mark.parametrize("keep", [-4, -1000])
@pytest.mark.parametrize("kind", ["text", "jsonl", "csv", "parquet"])
def test_read_compressed_file_cut_off_names_the_file(tmp_path: Path, kind: str, keep: int) -> None:
    file = tmp_path / f"a.{kind}.gz"
    _write_as(kind, file, make_lines(2000))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"\.gz is no whole (gzip|Parquet) file"):
        _read(kind, file)


@pytest.mark.parametrize("with_splits", [True, False])
def test_read_hf_folder_gives_all_rows(tmp_path: Path, with_splits: bool) -> None:
    texts = make_lines(300)
    data = datasets.Dataset.from_dict({"text": [*texts, None, "nul \0"]})
    saved = datasets.DatasetDict({"train": data, "validation": data}) if with_splits else data
    saved.save_to_disk(str(tmp_path / "saved"))
    batch = _read("hf", tmp_path / "saved")
    times = 2 if with_splits else 1
    assert batch.texts == texts * times
    assert _rejected(batch) == [(301, "no field 'text'"), (302, "NUL byte")] * times


def test_read_hf_folder_of_data_files_gives_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = make_lines(50)
    (tmp_path / "data").mkdir()
    _write_as("jsonl", tmp_path / "data" / "train.jsonl", texts)
    assert _read("hf", tmp_path / "data").texts == texts


def test_read_hf_nothing_there_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="gives no data set") as caught:
        _read("hf", tmp_path / "none")
    assert "\n" not in caught.value.message


def test_read_file_changed_after_the_index_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\n")
    (unit,) = index_corpus(CorpusSpec.build({"kind": "text", "train": str(file)}), 1_000).units
    file.write_text("one and more\n")
    with pytest.raises(UserError, match="was changed meanwhile"):
        list(read_unit(unit, Limits("text", 1_000)))
    file.unlink()
    with pytest.raises(UserError, match="storage that all nodes share"):
        list(read_unit(unit, Limits("text", 1_000)))
