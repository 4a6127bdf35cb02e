"""Conditional data: source and target from JSON Lines, Parquet and data sets into shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpora import index_corpus
from pipeline.corpora.reading import read_unit
from pipeline.corpora.units import Limits
from pipeline.errors import UserError
from pipeline.shards import Dataset
from pipeline.specs import PreprocessSpec
from pipeline.tokenization import encoder_of, load_tokenizer
from tests.pipeline.preprocess_data import make_lines, make_spec, write_dataset

FIELDS = {"kind": "jsonl", "source_field": "source", "text_field": "target"}


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    sources, targets = make_lines(count, seed), make_lines(count, seed + 100)
    return [{"source": s, "target": t} for s, t in zip(sources, targets, strict=True)]


def write_json(file: Path, rows: list[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(file)


def conditional_spec(folder: Path, **corpus: Any) -> PreprocessSpec:
    files = {
        name: write_json(folder / f"{name}.jsonl", pairs(count, seed))
        for seed, (name, count) in enumerate({"train": 90, "valid": 11}.items())
    }
    return make_spec(FIELDS | files | corpus)


def read_all(dataset: Dataset, split: str) -> list[tuple[list[int], list[int]]]:
    found = dataset.split(split)
    rows: list[tuple[list[int], list[int]]] = []
    for index in range(len(found.row_groups)):
        groups = found.read_conditions(index), found.read_row_group(index)
        rows += [(c.tolist(), d.tolist()) for c, d in zip(*groups, strict=True)]
    return rows


def test_pairs_become_documents_with_their_sources(tmp_path: Path) -> None:
    dataset = write_dataset(conditional_spec(tmp_path), tmp_path / "out")
    encoder = encoder_of(load_tokenizer(dataset.tokenizer_folder))
    given = pairs(90, 0)
    expected = [
        tuple(next(iter(encoder.encode([pair[name]]))).tolist() for name in ("source", "target"))
        for pair in given
    ]
    assert read_all(dataset, "train") == expected
    split = dataset.split("train")
    assert split.is_conditional
    np.testing.assert_array_equal(split.condition_lengths(), [len(c) for c, _ in expected])
    assert split.max_condition_length == max(len(c) for c, _ in expected)
    assert split.max_pair_length == max(len(c) + len(d) for c, d in expected)
    assert split.num_tokens == sum(len(d) for _, d in expected)
    manifest = dataset.manifest["splits"]["train"]
    assert manifest["condition_tokens"] == sum(len(c) for c, _ in expected)
    assert manifest["words"] == sum(len(pair["target"].split()) for pair in given)
    split.verify()


def test_pairs_bad_lines_are_rejected_with_line_and_reason(tmp_path: Path) -> None:
    good = {"source": "a source", "target": "a target"}
    rows = [
        good,
        {"source": "no target"},
        {"target": "no source"},
        {"source": "", "target": "empty source"},
        {"source": "empty target", "target": " \t"},
        "",
        "{broken",
        {"source": ["a", "list"], "target": "x"},
        {"source": "nul \0", "target": "x"},
        {"source": "y" * 200, "target": "x"},
        good,
    ]
    spec = make_spec(FIELDS | {"train": write_json(tmp_path / "a.jsonl", rows)})
    (unit,) = index_corpus(spec.corpus, 10_000).units
    (batch,) = read_unit(unit, Limits("target", 100, "source"))
    assert batch.texts == ["a target"] * 2
    assert batch.sources == ["a source"] * 2
    assert list(batch.lines) == [1, 11]
    assert {r.line: r.reason for r in batch.rejected} == {
        2: "no field 'target'",
        3: "no field 'source'",
        4: "empty field 'source'",
        5: "empty field 'target'",
        7: "broken JSON",
        8: "field 'source' is not a string",
        9: "NUL byte, in field 'source'",
        10: "longer than corpus.max_document_bytes, in field 'source'",
    }


def test_pairs_with_long_sources_or_targets_are_counted_rejections(tmp_path: Path) -> None:
    whole = write_dataset(conditional_spec(tmp_path), tmp_path / "whole")
    lengths = np.array([(len(c), len(d)) for c, d in read_all(whole, "train")])
    most = np.percentile(lengths, 60, axis=0).astype(int)
    spec = conditional_spec(
        tmp_path, max_source_tokens=int(most[0]), max_tokens=int(most[1]), max_rejected=1.0
    )
    cut = write_dataset(spec, tmp_path / "cut")
    fits = (lengths <= most).all(axis=1)
    assert cut.split("train").num_documents == fits.sum() > 0
    valid = np.array([(len(c), len(d)) for c, d in read_all(whole, "valid")])
    both = np.concatenate([lengths, valid])
    assert cut.manifest["rejected"] == {
        "longer than corpus.max_tokens": (both[:, 1] > most[1]).sum(),
        "longer than corpus.max_source_tokens": (
            (both[:, 0] > most[0]) & (both[:, 1] <= most[1])
        ).sum(),
    }


def test_pairs_of_one_source_stay_in_one_split(tmp_path: Path) -> None:
    sources = make_lines(40, 7)
    rows = [
        {"source": source, "target": f"target {i} of it"} for source in sources for i in range(3)
    ]
    train = write_json(tmp_path / "a.jsonl", rows)
    spec = make_spec(FIELDS | {"train": train, "valid_fraction": 0.3, "test_fraction": 0.2})
    dataset = write_dataset(spec, tmp_path / "out")
    seen = {s: {tuple(c) for c, _ in read_all(dataset, s)} for s in dataset.split_names}
    assert set(seen) == {"train", "valid", "test"}
    assert sum(map(len, seen.values())) == len(set.union(*seen.values())) == 40


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_pairs_from_tables_equal_those_from_json(tmp_path: Path, kind: str) -> None:
    spec = conditional_spec(tmp_path)
    expected = read_all(write_dataset(spec, tmp_path / "json"), "train")
    table = pa.Table.from_pylist(pairs(90, 0))
    if kind == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
        corpus = {"kind": kind, "train": str(tmp_path / "a.parquet"), "valid_fraction": 0}
    else:
        import datasets

        datasets.Dataset(table).save_to_disk(tmp_path / "hub")
        corpus = {"kind": kind, "path": str(tmp_path / "hub"), "valid_fraction": 0}
    tables = make_spec(FIELDS | corpus | {"test_fraction": 0})
    assert read_all(write_dataset(tables, tmp_path / "table"), "train") == expected


def test_pairs_without_a_source_column_names_those_there_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"sauce": ["a"], "target": ["b"]}), tmp_path / "a.parquet")
    spec = make_spec(FIELDS | {"kind": "parquet", "train": str(tmp_path / "a.parquet")})
    with pytest.raises(UserError, match=r"no column 'source'.*sauce"):
        index_corpus(spec.corpus, 1_000)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ({"kind": "text", "train": "a", "source_field": "s"}, "one of jsonl, parquet, hf"),
        ({"kind": "jsonl", "train": "a", "source_field": "text"}, "both 'text'"),
        ({"kind": "jsonl", "train": "a", "max_source_tokens": 9}, "corpus.source_field"),
    ],
)
def test_pairs_asked_for_in_a_way_that_cannot_be_are_refused(
    corpus: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_spec(corpus)
