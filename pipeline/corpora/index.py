"""The index of a corpus: what its files hold (by checksum), cut into units of work.

One pass over each file gives its checksum, the byte ranges that begin and end with lines, and
the number of the line that each begins with. Passes are remembered while the process lives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifact import digest
from pipeline.corpora import hub, python_docs
from pipeline.corpora.checks import chunks_of, damaged, require_text_column, sha256_of
from pipeline.corpora.files import FoundFile, find_files
from pipeline.corpora.units import Format, InputFile, Unit
from pipeline.progress import Progress
from pipeline.shards import SPLITS
from pipeline.specs import CorpusSpec
from pipeline.storage import Location

# A small corpus is cut finer than `shard_bytes`, so that all cores have work to the end.
_UNITS_AT_LEAST = 64
_SMALLEST_UNIT_BYTES = 1 << 20
_SHOW_PROGRESS_FROM_BYTES = 500_000_000


@dataclass(frozen=True)
class CorpusIndex:
    """A corpus as preprocess sees it."""

    units: list[Unit]
    files: list[InputFile]
    fingerprints: dict[str, str]  # "corpus.train" -> of the content
    splits: tuple[str, ...]  # that were given, or that the hash deals out
    by_hash: bool
    skipped: list[str]

    @property
    def bytes(self) -> int:
        """Bytes of all units, as the progress counts them."""
        return sum(unit.bytes for unit in self.units)


@dataclass(frozen=True)
class _Piece:
    """A unit before it has a number and a split."""

    span: tuple[int, int] | None
    first_line: int
    lines: int | None
    bytes: int


@dataclass(frozen=True)
class _FileIndex:
    sha256: str
    pieces: list[_Piece] = field(default_factory=list)


_seen: dict[tuple[object, ...], _FileIndex] = {}


def index_corpus(corpus: CorpusSpec, shard_bytes: int) -> CorpusIndex:
    """Index a corpus.

    Raises:
        UserError: if a file is missing, empty, damaged or lacks the text field's column.
    """
    if corpus.kind == "hf":
        return _index_hub(corpus, shard_bytes)
    if corpus.kind == "python_docs":
        source = python_docs.text_file()
        return _index_files(corpus, {"train": str(source)}, "text", shard_bytes)
    given = {name: uri for name in SPLITS if (uri := getattr(corpus, name)) is not None}
    return _index_files(corpus, given, corpus.kind, shard_bytes)


def _index_files(
    corpus: CorpusSpec, given: dict[str, str], kind: Format, shard_bytes: int
) -> CorpusIndex:
    by_hash = list(given) == ["train"]
    found = {split: find_files(f"corpus.{split}", uri, kind) for split, uri in given.items()}
    total = sum(file.size for split in found.values() for file in split.files)
    unit_bytes = unit_size(total, shard_bytes)
    units: list[Unit] = []
    files: list[InputFile] = []
    fingerprints: dict[str, str] = {}
    with _Shown(total) as shown:
        for split, listing in found.items():
            target = None if by_hash else split
            for file in listing.files:
                if not file.size:
                    continue
                index = _index_file(file, kind, unit_bytes, corpus.text_fields)
                files.append(InputFile(target, file.name, file.size, index.sha256))
                units += _numbered(index.pieces, len(units), target, kind, file)
                shown.add(file.size)
            hashes = [f.sha256 for f in files if f.split == target]
            fingerprints[f"corpus.{split}"] = digest({"split": target, "files": hashes})
    skipped = [name for listing in found.values() for name in listing.skipped]
    splits = tuple(SPLITS) if by_hash else tuple(given)
    return CorpusIndex(units, files, fingerprints, splits, by_hash, skipped)


def unit_size(total_bytes: int, shard_bytes: int) -> int:
    """Bytes of one unit: at most `shard_bytes`, less for a small corpus."""
    return min(shard_bytes, max(total_bytes // _UNITS_AT_LEAST, _SMALLEST_UNIT_BYTES))


def _numbered(
    pieces: list[_Piece], first: int, split: str | None, kind: Format, file: FoundFile
) -> Iterator[Unit]:
    for number, piece in enumerate(pieces, first):
        yield Unit(
            number, split, kind, file.location, piece.span, piece.first_line, piece.lines,
            piece.bytes, file.size,
        )  # fmt: skip


def _index_file(
    file: FoundFile, kind: Format, unit_bytes: int, text_fields: tuple[str, ...]
) -> _FileIndex:
    key = (str(file.location), file.size, file.modified_ns, kind, unit_bytes, text_fields)
    if key not in _seen:
        if file.name.endswith(".gz") or kind == "csv":
            whole = _Piece(None, 1, None, file.size)
            _seen[key] = _FileIndex(sha256_of(file.location), [whole])
        elif kind == "parquet":
            pieces = _row_groups(file, unit_bytes, text_fields)
            _seen[key] = _FileIndex(sha256_of(file.location), pieces)
        else:
            _seen[key] = _byte_ranges(file, unit_bytes)
    return _seen[key]


def _byte_ranges(file: FoundFile, unit_bytes: int) -> _FileIndex:
    """Cut a file of lines into ranges of about equal size, each of whole lines."""
    target = -(-file.size // -(-file.size // unit_bytes))
    found = hashlib.sha256()
    pieces: list[_Piece] = []
    start = position = lines = 0  # of the range, of the chunk, of the range
    first_line = 1
    for chunk in chunks_of(file.location):
        found.update(chunk)
        cursor = 0
        # Where the next multiple of `target` lies: what one long line adds is not carried on.
        while (wanted := (start // target + 1) * target - 1 - position) < len(chunk):
            newline = chunk.find(b"\n", max(wanted, cursor))
            if newline < 0:
                break
            stop = position + newline + 1
            lines += chunk.count(b"\n", cursor, newline + 1)
            pieces.append(_Piece((start, stop), first_line, lines, stop - start))
            first_line, lines, start, cursor = first_line + lines, 0, stop, newline + 1
        lines += chunk.count(b"\n", cursor)
        position += len(chunk)
    if position > start:
        pieces.append(_Piece((start, position), first_line, lines + 1, position - start))
    return _FileIndex(found.hexdigest(), pieces)


def _row_groups(file: FoundFile, unit_bytes: int, text_fields: tuple[str, ...]) -> list[_Piece]:
    """Cut a Parquet file into runs of row groups, from its footer alone."""
    try:
        with pq.ParquetFile(file.location.path, filesystem=file.location.filesystem) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise damaged(str(file.location), "Parquet", error) from None
    for name in text_fields:
        require_text_column(str(file.location), name, schema)
    pieces: list[_Piece] = []
    start = rows = size = 0
    first_row = 1
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        size += metadata.row_group(group).total_byte_size
        if size >= unit_bytes or group == metadata.num_row_groups - 1:
            share = file.size * (group + 1 - start) // metadata.num_row_groups
            pieces.append(_Piece((start, group + 1), first_row, rows, share))
            start, first_row, rows, size = group + 1, first_row + rows, 0, 0
    return pieces


def _index_hub(corpus: CorpusSpec, shard_bytes: int) -> CorpusIndex:
    listing = hub.list_splits(corpus)
    by_hash = list(listing.slices) == ["train"]
    units: list[Unit] = []
    for split, part in listing.slices.items():
        for name in corpus.text_fields:
            require_text_column(corpus.path or "", name, part.schema)
        pieces = max(1, -(-part.bytes // unit_size(listing.bytes, shard_bytes)))
        edges = [part.rows * i // pieces for i in range(pieces + 1)]
        target = None if by_hash else split
        for start, stop in pairwise(edges):
            if stop == start:
                continue
            share = part.bytes * (stop - start) // part.rows
            unit = Unit(
                len(units), target, "hf", part.source, (start, stop), start + 1, stop - start,
                share, part.bytes,
            )  # fmt: skip
            units.append(unit)
    splits = tuple(SPLITS) if by_hash else tuple(listing.slices)
    return CorpusIndex(
        units, listing.files, {"corpus": listing.fingerprint}, splits, by_hash, listing.skipped
    )


def relocated(index: CorpusIndex, target: Location) -> CorpusIndex:
    """The same index of a corpus of one file that was copied to where all nodes can read it."""
    return replace(index, units=[replace(unit, source=target) for unit in index.units])


def local_source(index: CorpusIndex) -> Path:
    """The file on this machine of a corpus of one file."""
    return Path(cast(Location, index.units[0].source).path)


class _Shown:
    """Progress over the files of a large corpus; a small one is indexed before anyone asks."""

    def __init__(self, total: int) -> None:
        self._done = 0
        shows = total >= _SHOW_PROGRESS_FROM_BYTES
        self._progress = Progress("index", total, "bytes") if shows else None

    def __enter__(self) -> _Shown:
        if self._progress:
            self._progress.__enter__()
        return self

    def add(self, size: int) -> None:
        self._done += size
        if self._progress:
            self._progress.update(self._done)

    def __exit__(self, *error: object) -> None:
        if self._progress:
            self._progress.__exit__(*error)  # type: ignore[arg-type]
