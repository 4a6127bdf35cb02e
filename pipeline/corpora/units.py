"""A unit of work: the piece of a corpus that one actor turns into one shard a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.storage import Location

Format = Literal["text", "jsonl", "parquet", "csv", "hf"]


@dataclass(frozen=True)
class HubSlice:
    """One split of a Hugging Face data set; workers load it themselves."""

    path: str  # a folder written by save_to_disk, a folder of data files, or a hub id
    name: str | None
    revision: str | None
    split: str | None  # as the data set calls it; None: it has no splits
    on_disk: bool  # whether save_to_disk wrote it


@dataclass(frozen=True)
class Unit:
    """A newline-aligned byte range, some row groups, a whole file, or a slice of rows."""

    number: int  # names its parts: part-00007
    split: str | None  # None: every document goes where the hash of its text says
    format: Format
    source: Location | HubSlice
    # Bytes (text, jsonl), row groups (parquet) or rows (hf), the last excluded. None: all of it,
    # which is what a compressed file and a CSV with its quoted newlines come to.
    span: tuple[int, int] | None
    first_line: int  # 1-based line, or row, that the unit begins with
    lines: int | None  # how many documents it can hold at most; None: unknown before reading
    bytes: int  # of the source, for progress
    source_bytes: int  # size of the whole file when it was indexed

    @property
    def source_name(self) -> str:
        """What errors and rejected/ call the source."""
        if isinstance(self.source, Location):
            return str(self.source)
        inner = f":{self.source.split}" if self.source.split else ""
        return f"{self.source.path}{inner}"

    def identity(self) -> dict[str, Any]:
        """What of this unit decides its shards, beside the content of the source."""
        span = None if self.span is None else list(self.span)
        return {"split": self.split, "format": self.format, "span": span, "number": self.number}


@dataclass(frozen=True)
class InputFile:
    """A file that a dataset was made from, as its manifest records it."""

    split: str | None
    name: str  # below the folder that was given
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Limits:
    """What a document must keep to, and which fields hold it."""

    text_field: str
    max_document_bytes: int
    source_field: str | None = None  # of conditional data: the field that holds the source


@dataclass(frozen=True)
class Rejection:
    """A document that was not taken: where it stands and why."""

    line: int  # 1-based; the row of a table
    reason: str
    excerpt: str


@dataclass(frozen=True)
class Batch:
    """Documents read together, and what was found between them."""

    texts: list[str]
    lines: Sequence[int]  # 1-based line, or row, of each text
    num_words: list[int]  # of each text, separated by white space
    rejected: list[Rejection] = field(default_factory=list)
    blank: int = 0  # lines without anything but white space
    sources: list[str] | None = None  # of conditional data: what each text is conditional on
