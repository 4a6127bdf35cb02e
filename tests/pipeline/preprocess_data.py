"""Small corpora, and preprocess without Ray, for the tests of what happens within a unit."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.corpora import Unit, index_corpus
from pipeline.corpora.commit import commit
from pipeline.corpora.writing import process_unit
from pipeline.shards import Dataset, Split
from pipeline.specs import PreprocessSpec
from pipeline.stages.preprocess import recipe_of
from pipeline.storage import Location

WORDS = (
    "the a small green heron wades through reeds and über Grüße 猫 — it's rain’s end, soon".split()
)


def make_lines(count: int, seed: int = 0) -> list[str]:
    """Distinct lines of 1 to 17 words, some of several bytes a letter."""
    rng = random.Random(seed)
    return [
        f"{' '.join(rng.choices(WORDS, k=rng.randint(1, 17)))} {seed}-{i}" for i in range(count)
    ]


def write_lines(file: Path, lines: list[str]) -> str:
    """Write a text file; return its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(file)


def make_spec(corpus: dict[str, Any], **rest: Any) -> PreprocessSpec:
    """A spec with a small BPE and small shards."""
    values: dict[str, Any] = {
        "corpus": {"kind": "text"} | corpus,
        "tokenizer": {"kind": "bpe", "vocab_size": 300},
        "shard_bytes": 2_000,
    }
    return PreprocessSpec.build(values | rest)


def write_dataset(
    spec: PreprocessSpec,
    folder: Path | Location,
    order: Callable[[list[Unit]], list[Unit]] = lambda units: units,
) -> Dataset:
    """Do all of preprocess in this process, the units in the order that `order` gives them."""
    index = index_corpus(spec.corpus, spec.shard_bytes)
    output = folder if isinstance(folder, Location) else Location.parse(folder)
    recipe, about = recipe_of(spec, index, output, Console(quiet=True))
    records = [process_unit(unit, recipe) for unit in order(list(index.units))]
    commit(index, recipe, about, sorted(records, key=lambda record: record.number))
    return Dataset.open(output)


def tree(folder: Path, *, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Checksums of all files below a folder, by name."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in without
    }


def document_ids(split: Split) -> list[str]:
    """The ids of all documents of a split, in order."""
    return [name for i in range(len(split.row_groups)) for name in split.read_document_ids(i)]
