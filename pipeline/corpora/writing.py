"""One unit into its shards: read, tokenise, write, and the record that says it is finished."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from pipeline.artifact import digest
from pipeline.corpora.reading import excerpt, read_unit
from pipeline.corpora.units import Batch, Limits, Rejection, Unit
from pipeline.shards import CONDITIONAL_SCHEMA, SCHEMA, Documents, Part
from pipeline.storage import Location
from pipeline.tokenization import Encoder, SpecialIds, rust_threads

UNITS = "units"  # records of finished units, until the manifest takes their place
REJECTED = "rejected"
_GROUP_ROWS = 8192
_GROUP_TOKENS = 4 << 20
_ID_BYTES = 16


@dataclass(frozen=True)
class HashSplit:
    """Shares of the documents that go to the validation and the test split."""

    valid_fraction: float
    test_fraction: float

    def of(self, document_id: str) -> str:
        """The split of a document: the same wherever and however often its text stands.

        Of conditional data it is the id of the source: what one source leads to stays together.
        """
        share = int(document_id[:13], 16) / 16**13
        if share < self.test_fraction:
            return "test"
        return "valid" if share < self.test_fraction + self.valid_fraction else "train"


def document_id(text: str) -> str:
    """A stable name for a text: BLAKE2b over its UTF-8, 32 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=_ID_BYTES).hexdigest()


@dataclass(frozen=True)
class Recipe:
    """What turns units into shards; travels to the workers."""

    output: Location
    tokenizer: Location  # its tokenizer.json
    tokenizer_fingerprint: str
    special: SpecialIds
    limits: Limits
    max_tokens: int | None
    max_source_tokens: int | None
    hash_split: HashSplit | None
    versions: dict[str, str]

    def key(self, unit: Unit) -> str:
        """Names the unit's work by content, so that another run recognises it as finished."""
        return digest(
            {
                "unit": unit.identity(),
                "source_bytes": unit.source_bytes,
                "tokenizer": self.tokenizer_fingerprint,
                "limits": asdict(self.limits),
                "max_tokens": self.max_tokens,
                "max_source_tokens": self.max_source_tokens,
                "hash_split": None if self.hash_split is None else asdict(self.hash_split),
                "versions": self.versions,
            }
        )


@dataclass
class UnitRecord:
    """What became of one unit."""

    number: int
    key: str
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)  # by split
    blank: int = 0
    rejected: dict[str, int] = field(default_factory=dict)  # by reason
    examples: dict[str, list[Any]] = field(default_factory=dict)  # reason -> file, first line
    rejected_file: str | None = None

    @property
    def documents(self) -> int:
        """Documents of all splits."""
        return sum(part["documents"] for part in self.parts.values())

    @property
    def tokens(self) -> int:
        """Tokens of all splits."""
        return sum(part["tokens"] for part in self.parts.values())

    @property
    def num_rejected(self) -> int:
        """Rejected documents, whatever the reason."""
        return sum(self.rejected.values())


def process_unit(unit: Unit, recipe: Recipe) -> UnitRecord:
    """Write the shards of one unit; the same bytes whenever and wherever it is done.

    Raises:
        UserError: if the source cannot be read as a whole.
    """
    encoder = _encoder(recipe)
    record = UnitRecord(unit.number, recipe.key(unit))
    name = f"part-{unit.number:05d}"
    schema = SCHEMA if recipe.limits.source_field is None else CONDITIONAL_SCHEMA
    with _Outputs(recipe.output, name, schema) as outputs, rust_threads(False):
        for batch in read_unit(unit, recipe.limits):
            record.blank += batch.blank
            rejected = batch.rejected
            if batch.texts:
                kept, too_long, table = _encoded(batch, encoder, recipe)
                rejected = sorted(rejected + too_long, key=lambda r: r.line)
                for split, rows in _by_split(table, kept, unit, recipe.hash_split):
                    outputs.part(split).add(rows)
            if rejected:
                _note(record, rejected, unit.source_name)
                outputs.reject(rejected, unit.source_name)
        record.parts, record.rejected_file = outputs.finish()
    (recipe.output / UNITS / f"{unit.number:05d}.json").write_json(asdict(record))
    return record


_encoders: dict[str, Encoder] = {}


def _encoder(recipe: Recipe) -> Encoder:
    """The encoder, loaded once a process. Without transformers: that import takes seconds."""
    if recipe.tokenizer_fingerprint not in _encoders:
        backend = Tokenizer.from_str(recipe.tokenizer.read_bytes().decode())
        _encoders.clear()
        _encoders[recipe.tokenizer_fingerprint] = Encoder(backend, recipe.special)
    return _encoders[recipe.tokenizer_fingerprint]


def _encoded(
    batch: Batch, encoder: Encoder, recipe: Recipe
) -> tuple[list[str], list[Rejection], pa.RecordBatch]:
    """The texts that decide on the split, what is too long, and the rows of the rest."""
    documents = encoder.encode(batch.texts)
    named = batch.texts
    columns = [
        _token_column(documents),
        pa.array(documents.lengths),
        pa.array(batch.num_words, pa.int32()),
    ]
    limits = [(documents.lengths, recipe.max_tokens, "corpus.max_tokens")]
    schema = SCHEMA
    if batch.sources is not None:
        sources = encoder.encode(batch.sources)
        columns += [_token_column(sources), pa.array(sources.lengths)]
        limits.append((sources.lengths, recipe.max_source_tokens, "corpus.max_source_tokens"))
        schema = CONDITIONAL_SCHEMA
        # Neither half holds a NUL, so that no two pairs come to the same text.
        named = [f"{s}\0{t}" for s, t in zip(batch.sources, batch.texts, strict=True)]
    names = pa.array([document_id(text) for text in named], pa.string())
    table = pa.RecordBatch.from_arrays([names, *columns], schema=schema)
    keys = batch.texts if batch.sources is None else batch.sources
    fits = np.ones(len(batch.texts), bool)
    too_long: list[Rejection] = []
    for lengths, most, key in limits:
        if most is None:
            continue
        too_long += [
            Rejection(batch.lines[i], f"longer than {key}", excerpt(batch.texts[i]))
            for i in np.flatnonzero(fits & (lengths > most)).tolist()
        ]
        fits &= lengths <= most
    if fits.all():
        return keys, [], table
    return list(compress(keys, fits)), too_long, table.filter(pa.array(fits))


def _token_column(documents: Documents) -> pa.ListArray:
    return pa.ListArray.from_arrays(
        pa.array(documents.offsets.astype(np.int32)),
        pa.array(documents.values),
        type=SCHEMA.field("input_ids").type,
    )


def _by_split(
    table: pa.RecordBatch, keys: list[str], unit: Unit, hash_split: HashSplit | None
) -> Iterator[tuple[str, pa.RecordBatch]]:
    if unit.split is not None or hash_split is None:
        yield unit.split or "train", table
        return
    splits = [hash_split.of(document_id(key)) for key in keys]
    present = sorted(set(splits))
    for split in present:
        mine = [name == split for name in splits]
        yield split, table if len(present) == 1 else table.filter(pa.array(mine))


def _note(record: UnitRecord, rejected: list[Rejection], source: str) -> None:
    for reason, count in Counter(r.reason for r in rejected).items():
        record.rejected[reason] = record.rejected.get(reason, 0) + count
    for rejection in rejected:
        record.examples.setdefault(rejection.reason, [source, rejection.line])


class _Sink:
    """A new file that appears under its name when it is whole, and its checksum.

    A file on a local disk is written beside its place and moved there; an object appears when
    its upload ends.
    """

    closed = False
    _abandoned = False

    def __init__(self, target: Location) -> None:
        self._target = target
        target.parent.make_folder()
        suffix = f".{uuid4().hex[:8]}.tmp" if target.is_local else ""
        self._path = f"{target.path}{suffix}"
        self._stream = target.filesystem.open_output_stream(self._path, compression=None)
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self._abandoned:
            return size
        self._stream.write(data)
        self._hash.update(data)
        self.bytes += size
        return size

    def flush(self) -> None:
        """The stream is flushed when it closes."""

    def commit(self) -> str:
        """Make the file appear; return its sha256 in hex."""
        self._stream.close()
        if self._target.is_local:
            Path(self._path).replace(self._target.path)
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Leave nothing behind on a local disk; an object stays unnamed by any manifest.

        What is written afterwards goes nowhere.
        """
        self._abandoned = True
        self._stream.close()
        if self._target.is_local:
            Path(self._path).unlink(missing_ok=True)


class _PartWriter:
    """One Parquet file, written a row group at a time."""

    def __init__(self, folder: Location, file: str, schema: pa.Schema) -> None:
        self._file = file
        self._sink = _Sink(folder / file)
        tokens = [f.name for f in schema if pa.types.is_list(f.type)]
        self._writer = pq.ParquetWriter(
            pa.PythonFile(self._sink, mode="w"),
            schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=False,
            write_page_checksum=True,  # whoever reads a page finds a flipped bit in it
            column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in tokens},
        )
        self._waiting: list[pa.RecordBatch] = []
        self._row_groups: list[int] = []
        self._rows = self._tokens = 0  # of what waits
        self._documents = self._all_tokens = self._words = self._longest = 0
        self._source_tokens = self._longest_source = self._longest_pair = 0

    def add(self, rows: pa.RecordBatch) -> None:
        """Take documents; they are written when there are enough for a row group."""
        if not rows.num_rows:
            return
        lengths = rows.column("length").to_numpy()
        tokens = int(lengths.sum(dtype=np.int64))
        self._waiting.append(rows)
        self._rows += rows.num_rows
        self._tokens += tokens
        self._documents += rows.num_rows
        self._all_tokens += tokens
        self._words += int(rows.column("num_words").to_numpy().sum(dtype=np.int64))
        self._longest = max(self._longest, int(lengths.max()))
        if "condition_length" in rows.schema.names:
            sources = rows.column("condition_length").to_numpy()
            source_tokens = int(sources.sum(dtype=np.int64))
            self._tokens += source_tokens
            self._source_tokens += source_tokens
            self._longest_source = max(self._longest_source, int(sources.max()))
            self._longest_pair = max(self._longest_pair, int((sources + lengths).max()))
        if self._rows >= _GROUP_ROWS or self._tokens >= _GROUP_TOKENS:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            table = pa.Table.from_batches(self._waiting).combine_chunks()
            self._writer.write_table(table, row_group_size=table.num_rows)
            self._row_groups.append(table.num_rows)
        self._waiting, self._rows, self._tokens = [], 0, 0

    def finish(self) -> dict[str, Any] | None:
        """Make the file appear; return the manifest's entry, or None when it has no rows."""
        self._write()
        self._writer.close()
        if not self._documents:
            self._sink.abandon()
            return None
        checksum = self._sink.commit()
        part = Part(
            self._file, self._documents, self._all_tokens, self._words, self._longest,
            self._sink.bytes, checksum, tuple(self._row_groups), self._source_tokens,
            self._longest_source, self._longest_pair,
        )  # fmt: skip
        return part.record()

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._sink.abandon()
        self._writer.close()


class _Outputs:
    """The files that one unit writes, each opened when there is something for it."""

    def __init__(self, folder: Location, name: str, schema: pa.Schema) -> None:
        self._folder, self._name, self._schema = folder, name, schema
        self._parts: dict[str, _PartWriter] = {}
        self._rejected: _Sink | None = None

    def __enter__(self) -> _Outputs:
        return self

    def part(self, split: str) -> _PartWriter:
        """The part of a split."""
        if split not in self._parts:
            file = f"{split}/{self._name}.parquet"
            self._parts[split] = _PartWriter(self._folder, file, self._schema)
        return self._parts[split]

    def reject(self, rejected: list[Rejection], source: str) -> None:
        """Write down what was not taken."""
        if self._rejected is None:
            self._rejected = _Sink(self._folder / REJECTED / f"{self._name}.jsonl")
        for rejection in rejected:
            line = {"file": source} | asdict(rejection)
            self._rejected.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def finish(self) -> tuple[dict[str, dict[str, Any]], str | None]:
        """Make all files appear; return the parts by split, and the name of the rejected file."""
        found = {split: part.finish() for split, part in sorted(self._parts.items())}
        file = None
        if self._rejected is not None:
            self._rejected.commit()
            file = f"{REJECTED}/{self._name}.jsonl"
        self._parts, self._rejected = {}, None
        return {split: part for split, part in found.items() if part is not None}, file

    def __exit__(self, *error: object) -> None:
        for part in self._parts.values():
            part.abandon()
        if self._rejected is not None:
            self._rejected.abandon()


@contextmanager
def one_arrow_thread() -> Iterator[None]:
    """Keep Arrow within the one CPU that an actor has, while the body runs."""
    before = pa.cpu_count()
    pa.set_cpu_count(1)
    try:
        yield
    finally:
        pa.set_cpu_count(before)
