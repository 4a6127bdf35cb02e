"""Documents out of a unit, in batches of about a megabyte; what cannot be taken, with its reason.

Memory stays bounded whatever the source holds: a line longer than a document may be is skipped
over, never held.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpora import hub
from pipeline.corpora.checks import damaged, require_text_column
from pipeline.corpora.delimited import read_csv
from pipeline.corpora.lines import Lines, LongLine, whole_lines
from pipeline.corpora.units import Batch, HubSlice, Limits, Rejection, Unit
from pipeline.errors import UserError
from pipeline.storage import Location

ROWS_AT_ONCE = 1024
EXCERPT_CHARACTERS = 80
_SPACE = np.array([chr(byte).isspace() for byte in range(128)] + [False] * 128)


def read_unit(unit: Unit, limits: Limits) -> Iterator[Batch]:
    """Read the documents of a unit, in order.

    Raises:
        UserError: if the source is gone, has changed since it was indexed, or is damaged.
    """
    if isinstance(unit.source, HubSlice):
        yield from _read_hub(unit, unit.source, limits)
        return
    _require_unchanged(unit, unit.source)
    name = unit.source_name
    try:
        if unit.format == "parquet":
            with _uncompressed(unit.source) as file:
                yield from _read_parquet(unit, file, limits)
        else:
            with _opened(unit.source) as stream:
                yield from _read_stream(unit, stream, limits)
    except FileNotFoundError as error:
        raise UserError(f"{name} cannot be read from this node ({error}): {_SHARE_IT}") from None
    except (pa.ArrowException, OSError, EOFError) as error:
        what = "Parquet" if unit.format == "parquet" else "gzip"
        if not name.endswith(".gz") and unit.format != "parquet":
            raise
        raise damaged(name, what, error) from None


_SHARE_IT = "every node reads the corpus; put it on storage that all nodes share."


def _require_unchanged(unit: Unit, source: Location) -> None:
    info = source.info()
    if info.size is None:
        raise UserError(f"{source} is not there, seen from the node that reads it: {_SHARE_IT}")
    if info.size != unit.source_bytes:
        raise UserError(
            f"{source} has {info.size} bytes, but had {unit.source_bytes} when the run began: it "
            "was changed meanwhile, so its shards would mix two versions; run the command again."
        )


@contextmanager
def _opened(source: Location) -> Iterator[pa.NativeFile]:
    compression = "gzip" if source.name.endswith(".gz") else None
    with source.filesystem.open_input_stream(source.path, compression=compression) as stream:
        yield stream


@contextmanager
def _uncompressed(source: Location) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, or a compressed one by way of a temporary copy."""
    if not source.name.endswith(".gz"):
        with pq.ParquetFile(source.path, filesystem=source.filesystem) as file:
            yield file
        return
    with tempfile.NamedTemporaryFile(suffix=".parquet") as copy:
        with (
            source.filesystem.open_input_stream(source.path, compression=None) as stream,
            gzip.open(stream) as plain,
        ):
            shutil.copyfileobj(plain, copy)
        copy.flush()
        with pq.ParquetFile(copy.name) as file:
            yield file


def _read_stream(unit: Unit, stream: pa.NativeFile, limits: Limits) -> Iterator[Batch]:
    if unit.format == "csv":
        for rows in read_csv(stream, unit.source_name, limits.text_field):
            yield screen(rows.texts, rows.lines, limits, rows.rejected)
        return
    length = None
    if unit.span is not None:
        length = unit.span[1] - unit.span[0]
        if unit.span[0]:
            stream.close()
            source = unit.source
            assert isinstance(source, Location)
            with source.filesystem.open_input_file(source.path) as file:
                file.seek(unit.span[0])
                yield from _read_lines(unit, file, length, limits)
            return
    yield from _read_lines(unit, stream, length, limits)


def _read_lines(
    unit: Unit, stream: pa.NativeFile, length: int | None, limits: Limits
) -> Iterator[Batch]:
    # A JSON line holds more than the document; its other fields may be as long again.
    longest = limits.max_document_bytes * (4 if unit.format == "jsonl" else 1)
    for piece in whole_lines(stream, length, unit.first_line, longest):
        if isinstance(piece, LongLine):
            reason = "longer than corpus.max_document_bytes"
            head = piece.head.decode("utf-8", "replace")[:EXCERPT_CHARACTERS]
            yield Batch([], [], [], [Rejection(piece.line, reason, head)])
        elif unit.format == "jsonl":
            yield _parse_json(piece, limits)
        else:
            numbers = range(piece.first_line, piece.first_line + len(piece.texts))
            yield screen(piece.texts, numbers, limits)


def _parse_json(piece: Lines, limits: Limits) -> Batch:
    fields = _fields(limits)
    columns: dict[str, list[str]] = {name: [] for name in fields}
    numbers: list[int] = []
    rejected: list[Rejection] = []
    blank = 0
    for number, line in enumerate(piece.texts, piece.first_line):
        if not line.strip():
            blank += 1
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            reason: str | None = "broken JSON"
        else:
            problems = (_field_problem(value, name) for name in fields)
            reason = next((problem for problem in problems if problem), None)
        if reason is None:
            for name, column in columns.items():
                column.append(value[name])
            numbers.append(number)
        else:
            rejected.append(Rejection(number, reason, excerpt(line)))
    return _screen_fields(columns, numbers, limits, rejected, blank)


def _fields(limits: Limits) -> list[str]:
    """The fields that are read: the document's, and its source's where the data has one."""
    return [limits.text_field] + ([limits.source_field] if limits.source_field else [])


def _screen_fields(
    columns: Mapping[str, list[str]],
    lines: Sequence[int],
    limits: Limits,
    rejected: Iterable[Rejection] = (),
    blank: int = 0,
) -> Batch:
    texts = columns[limits.text_field]
    if limits.source_field is None:
        return screen(texts, lines, limits, rejected, blank)
    return screen_pairs(columns[limits.source_field], texts, lines, limits, rejected)


def _field_problem(value: object, name: str) -> str | None:
    if not isinstance(value, dict):
        return "not a JSON object"
    if value.get(name) is None:
        return f"no field '{name}'"
    return None if isinstance(value[name], str) else f"field '{name}' is not a string"


def _read_parquet(unit: Unit, file: pq.ParquetFile, limits: Limits) -> Iterator[Batch]:
    if unit.span is None:  # a compressed one could not be looked into before
        for name in _fields(limits):
            require_text_column(unit.source_name, name, file.schema_arrow)
    groups = range(*unit.span) if unit.span else range(file.num_row_groups)
    row = unit.first_line
    batches = file.iter_batches(
        batch_size=ROWS_AT_ONCE, row_groups=list(groups), columns=_fields(limits),
        use_threads=False,
    )  # fmt: skip
    for batch in batches:
        columns = {name: _strings(batch.column(name)) for name in _fields(limits)}
        yield _screen_columns(columns, row, limits)
        row += batch.num_rows


def _strings(column: pa.Array) -> list[str | None]:
    """The values; bytes that are no UTF-8 come as surrogates, which screening finds."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        values: list[str | None] = column.to_pylist()
    except UnicodeDecodeError:
        raw = column.cast(pa.large_string()).view(pa.large_binary()).to_pylist()
        values = [v if v is None else v.decode("utf-8", "surrogateescape") for v in raw]
    return values


def _read_hub(unit: Unit, source: HubSlice, limits: Limits) -> Iterator[Batch]:
    assert unit.span is not None
    dataset = hub.load(source)
    for start in range(*unit.span, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, unit.span[1])
        columns = dataset[start:stop]
        columns = {name: columns[name] for name in _fields(limits)}
        yield _screen_columns(columns, start + 1, limits)


def _screen_columns(
    columns: Mapping[str, list[str | None]], first_row: int, limits: Limits
) -> Batch:
    kept: dict[str, list[str]] = {name: [] for name in columns}
    rows: list[int] = []
    rejected: list[Rejection] = []
    for row, values in enumerate(zip(*columns.values(), strict=True), first_row):
        absent = next((n for n, v in zip(columns, values, strict=True) if v is None), None)
        if absent is not None:
            rejected.append(Rejection(row, f"no field '{absent}'", ""))
            continue
        rows.append(row)
        for column, value in zip(kept.values(), values, strict=True):
            column.append(value or "")
    return _screen_fields(kept, rows, limits, rejected)


def screen(
    texts: list[str],
    lines: Sequence[int],
    limits: Limits,
    rejected: Iterable[Rejection] = (),
    blank: int = 0,
) -> Batch:
    """Sort texts into documents, blank lines and rejected ones.

    Bytes that were no UTF-8 are expected as surrogates (`errors="surrogateescape"`).
    """
    found = list(rejected)
    num_words = count_words(texts)
    if all(num_words) and _all_fine(texts, limits):
        return Batch(texts, lines, num_words, found, blank)
    kept = Batch([], [], [], found, 0)
    kept_lines: list[int] = []
    for text, line, words in zip(texts, lines, num_words, strict=True):
        if not words:
            blank += 1
        elif reason := _problem(text, limits):
            found.append(Rejection(line, reason, excerpt(text)))
        else:
            kept.texts.append(text)
            kept.num_words.append(words)
            kept_lines.append(line)
    found.sort(key=lambda rejection: rejection.line)
    return Batch(kept.texts, kept_lines, kept.num_words, found, blank)


def screen_pairs(
    sources: list[str],
    texts: list[str],
    lines: Sequence[int],
    limits: Limits,
    rejected: Iterable[Rejection] = (),
) -> Batch:
    """As `screen`, of documents with their sources; a pair with an empty half is rejected."""
    kept = Batch([], [], [], list(rejected), sources=[])
    assert kept.sources is not None
    kept_lines: list[int] = []
    rows = zip(sources, texts, lines, count_words(texts), strict=True)
    for source, text, line, num_words in rows:
        reason = _pair_problem(str(limits.source_field), source, limits)
        reason = reason or _pair_problem(limits.text_field, text, limits)
        if reason:
            kept.rejected.append(Rejection(line, reason, excerpt(text or source)))
            continue
        kept.texts.append(text)
        kept.sources.append(source)
        kept.num_words.append(num_words)
        kept_lines.append(line)
    kept.rejected.sort(key=lambda rejection: rejection.line)
    return replace(kept, lines=kept_lines)


def _pair_problem(name: str, text: str, limits: Limits) -> str | None:
    if not text.strip():
        return f"empty field '{name}'"
    problem = _problem(text, limits)
    return problem and f"{problem}, in field '{name}'"


def count_words(texts: Sequence[str]) -> list[int]:
    """`len(text.split())` of each text; all at once where they are ASCII, which is much faster."""
    if not texts:
        return []
    plain = [text if text.isascii() else "" for text in texts]
    ends = np.cumsum([len(text) + 1 for text in plain])
    is_space = _SPACE[np.frombuffer("\n".join(["", *plain]).encode(), np.uint8)]
    # Up to each end, how many words have begun.
    begun = np.concatenate([[0], np.cumsum(is_space[:-1] & ~is_space[1:], dtype=np.int32)])
    counts: list[int] = np.diff(begun[ends - 1], prepend=0).tolist()
    for i, text in enumerate(texts):
        if not text.isascii():
            counts[i] = len(text.split())
    return counts


def _all_fine(texts: list[str], limits: Limits) -> bool:
    """Whether no text has a problem; quick, since nearly always so."""
    together = "".join(texts)
    if "\0" in together:
        return False
    try:
        together.encode()
    except UnicodeEncodeError:
        return False
    longest = max(map(len, texts), default=0)
    return longest * 4 <= limits.max_document_bytes or all(
        len(text.encode()) <= limits.max_document_bytes for text in texts
    )


def _problem(text: str, limits: Limits) -> str | None:
    if "\0" in text:
        return "NUL byte"
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "invalid UTF-8"
    too_long = size > limits.max_document_bytes
    return "longer than corpus.max_document_bytes" if too_long else None


def excerpt(text: str) -> str:
    """The beginning of a text, in a form that JSON and a terminal can hold."""
    return text[:EXCERPT_CHARACTERS].encode("utf-8", "backslashreplace").decode()
