"""A small dataset on disk, and specs to train on it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shards import FORMAT, MANIFEST, SCHEMA, Dataset
from pipeline.specs import TrainSpec
from pipeline.storage import Location
from pipeline.tokenization import encoder_of, fingerprint_tokenizer, train_bpe

_WORDS = (
    "the a small red old quick fox dog tree house runs sees eats sleeps near under big of".split()
)


def sentences(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(_WORDS, random.integers(2, 14))) + "." for _ in range(count)]


def write_dataset(
    folder: Path, splits: dict[str, list[str]], rows_per_group: int = 37, rows_per_part: int = 100
) -> Dataset:
    """Write the splits in the format that `pipeline.shards` reads."""
    tokenizer = train_bpe([sentences(200)], 300)
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder = encoder_of(tokenizer)
    records: dict[str, Any] = {}
    for name, texts in splits.items():
        parts = []
        for start in range(0, len(texts), rows_per_part):
            documents = list(encoder.encode(texts[start : start + rows_per_part]))
            parts.append(_write_part(folder, name, start, documents, rows_per_group))
        records[name] = {"documents": len(texts), "parts": parts}
    manifest = {
        "format": FORMAT,
        "tokenizer": {"fingerprint": fingerprint_tokenizer(tokenizer)},
        "splits": records,
    }
    location = Location.parse(folder)
    (location / MANIFEST).write_json(manifest)
    return Dataset.open(location)


def _write_part(
    folder: Path, split: str, start: int, documents: list[np.ndarray], rows: int
) -> dict[str, Any]:
    lengths = [len(d) for d in documents]
    table = pa.table(
        {
            "document_id": [f"{split}-{start + i}" for i in range(len(documents))],
            "input_ids": documents,
            "length": lengths,
            "num_words": lengths,
        },
        schema=SCHEMA,
    )
    file = folder / split / f"part-{start:05d}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=rows, compression="zstd")
    groups = pq.ParquetFile(file).metadata
    return {
        "file": f"{split}/{file.name}",
        "documents": len(documents),
        "tokens": sum(lengths),
        "words": sum(lengths),
        "max_length": max(lengths),
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "row_groups": [groups.row_group(i).num_rows for i in range(groups.num_row_groups)],
    }


def small_dataset(folder: Path, train: int = 230, valid: int = 40) -> Dataset:
    splits = {"train": sentences(train, 1)}
    if valid:
        splits["valid"] = sentences(valid, 2)
    return write_dataset(folder, splits)


def train_spec(**values: Any) -> TrainSpec:
    """A spec of seconds: dotted keys replace its values."""
    base: dict[str, Any] = {
        "model": {"size": "tiny", "context": 64, "latent_size": 5, "dropout": 0.1},
        "train": {
            "max_steps": 6,
            "batch_tokens": 512,
            "micro_batch_tokens": 512,
            "warmup_steps": 2,
            "checkpoint_every": 2,
            "eval_every": 3,
            "log_every": 1,
            "beta": {"kind": "linear", "delay": 0.0, "warmup": 0.5},
            "free_bits": 0.0,
            "free_bits_per": "layer",
        },
        "deepspeed": {"zero_stage": 2},
        "cluster": {"num_cpus": 2},
    }
    for key, value in values.items():
        *sections, last = key.split("__")
        node = base
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return TrainSpec.build(base)
