"""The shards on disk, read: `Dataset.open(folder).split("train").read_row_group(0)`.

`<split>/part-*.parquet` beside `manifest.json`, which is written last: it is the commit marker,
and names every part with its rows, tokens, size and checksum. A folder without a manifest holds
no dataset, whatever else lies in it. Every page carries a checksum too, which is verified as it is
read: damage is found before training sees it, without reading a part for that alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifact import digest
from pipeline.errors import UserError
from pipeline.storage import Location

FORMAT = 1
MANIFEST = "manifest.json"
CHECKSUM = "checksum"  # of the manifest's other keys
SPLITS = ("train", "valid", "test")
SCHEMA = pa.schema(
    [
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.field("item", pa.int32(), nullable=False))),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("num_words", pa.int32(), nullable=False),
    ]
)
# Of conditional data: what the document is to be generated from, framed as a document too.
CONDITIONAL_SCHEMA = SCHEMA.append(
    pa.field("condition_ids", SCHEMA.field("input_ids").type)
).append(pa.field("condition_length", pa.int32(), nullable=False))
_READ_THREADS = 8


@dataclass(frozen=True)
class Documents:
    """Token ids of several documents, one after the other, without padding.

    `documents[k]` is document k, from BOS to EOS: a view, int32.
    """

    values: np.ndarray  # int32, all documents' tokens
    offsets: np.ndarray  # int64, where each document starts, and the end of the last

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):  # also what ends `for document in documents`
            raise IndexError(f"document {index} of {len(self)}")
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, with BOS and EOS, int32."""
        return np.diff(self.offsets).astype(np.int32)

    @classmethod
    def from_arrow(cls, column: pa.ChunkedArray | pa.ListArray) -> Documents:
        """Wrap an `input_ids` column, without a copy when it is one chunk."""
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if isinstance(array, pa.ChunkedArray):  # no rows
            return cls(np.zeros(0, np.int32), np.zeros(1, np.int64))
        offsets = array.offsets.to_numpy().astype(np.int64)
        return cls(array.flatten().to_numpy(), offsets - offsets[0])


class RowGroup(NamedTuple):
    """Where a run of documents lies: the smallest piece that is read alone."""

    part_index: int
    row_group_index: int  # within the part
    first_document: int  # within the split
    num_rows: int


@dataclass(frozen=True)
class Part:
    """One Parquet file of a split, as the manifest records it."""

    file: str  # below the dataset's folder: "train/part-00007.parquet"
    documents: int
    tokens: int
    words: int
    max_length: int  # tokens
    bytes: int
    sha256: str
    row_groups: tuple[int, ...]  # documents of each
    # Of conditional data: tokens of the sources, of the longest source, of the longest source with
    # its document. 0 where there are none.
    condition_tokens: int = 0
    max_condition_length: int = 0
    max_pair_length: int = 0

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Part:
        """Read the manifest's entry."""
        values = {field.name: record[field.name] for field in fields(cls) if field.name in record}
        return cls(**values | {"row_groups": tuple(record["row_groups"])})

    def record(self) -> dict[str, Any]:
        """The manifest's entry; without conditions it says nothing of them."""
        values = asdict(self)
        if not self.condition_tokens:
            for name in ("condition_tokens", "max_condition_length", "max_pair_length"):
                del values[name]
        return values


@dataclass(frozen=True)
class Split:
    """The documents of one split, in the order of its parts."""

    name: str
    folder: Location  # the dataset's
    parts: tuple[Part, ...]

    @property
    def num_documents(self) -> int:
        """Documents of all parts."""
        return sum(part.documents for part in self.parts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, BOS and EOS among them."""
        return sum(part.tokens for part in self.parts)

    @property
    def num_predicted_tokens(self) -> int:
        """Tokens that a language model predicts: all but each document's BOS."""
        return self.num_tokens - self.num_documents

    @property
    def num_words(self) -> int:
        """Words of the raw text, separated by white space."""
        return sum(part.words for part in self.parts)

    @property
    def max_length(self) -> int:
        """Tokens of the longest document, with BOS and EOS."""
        return max(part.max_length for part in self.parts)

    @property
    def is_conditional(self) -> bool:
        """Whether every document has a source that it is to be generated from."""
        return self.max_condition_length > 0

    @property
    def max_condition_length(self) -> int:
        """Tokens of the longest source, with BOS and EOS; 0 without sources."""
        return max(part.max_condition_length for part in self.parts)

    @property
    def max_pair_length(self) -> int:
        """Tokens of the longest document together with its source; 0 without sources."""
        return max(part.max_pair_length for part in self.parts)

    @cached_property
    def row_groups(self) -> list[RowGroup]:
        """All row groups, in document order; known from the manifest, no part is opened."""
        found: list[RowGroup] = []
        first = 0
        for part_index, part in enumerate(self.parts):
            for group_index, num_rows in enumerate(part.row_groups):
                found.append(RowGroup(part_index, group_index, first, num_rows))
                first += num_rows
        return found

    def lengths(self) -> np.ndarray:
        """Tokens of every document, int32, in document order; only that column is read."""
        return self._column("length")

    def num_words_per_document(self) -> np.ndarray:
        """Words of every document, int32, in document order; only that column is read."""
        return self._column("num_words")

    def condition_lengths(self) -> np.ndarray:
        """Tokens of every document's source, int32; zeros where there are no sources."""
        if not self.is_conditional:
            return np.zeros(self.num_documents, np.int32)
        return self._column("condition_length")

    def read_row_group(self, index: int) -> Documents:
        """Read the documents of `row_groups[index]`.

        Raises:
            UserError: if the part is missing or damaged.
        """
        return self._read_tokens(index, "input_ids")

    def read_conditions(self, index: int) -> Documents:
        """Read the sources of the documents of `row_groups[index]`, of conditional data.

        Raises:
            UserError: if the part is missing or damaged.
        """
        return self._read_tokens(index, "condition_ids")

    def _read_tokens(self, index: int, column: str) -> Documents:
        group = self.row_groups[index]
        part = self.parts[group.part_index]

        def read(file: pq.ParquetFile) -> pa.Table:
            return file.read_row_group(group.row_group_index, columns=[column], use_threads=False)

        documents = Documents.from_arrow(self._read(part, read).column(column))
        if len(documents) != group.num_rows:
            raise self._damaged(
                part, f"{len(documents)} documents where {group.num_rows} should be"
            )
        return documents

    def read_document_ids(self, index: int) -> list[str]:
        """Read the stable ids of the documents of `row_groups[index]`."""
        group = self.row_groups[index]

        def read(file: pq.ParquetFile) -> pa.Table:
            return file.read_row_group(group.row_group_index, columns=["document_id"])

        table = self._read(self.parts[group.part_index], read)
        ids: list[str] = table.column("document_id").to_pylist()
        return ids

    def verify(self) -> None:
        """Check size and checksum of every part; this reads all of them once.

        Raises:
            UserError: naming the first part that is missing or damaged.
        """
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            for _ in pool.map(self._verify_part, self.parts):
                pass

    def _verify_part(self, part: Part) -> None:
        file = self.folder / part.file
        info = file.info()
        if not file.is_file():
            raise self._damaged(part, "it is missing")
        if info.size != part.bytes:
            raise self._damaged(part, f"it has {info.size} bytes, not {part.bytes}")
        if file.sha256() != part.sha256:
            raise self._damaged(part, "its checksum is another")

    def _column(self, name: str) -> np.ndarray:
        def read_one(part: Part) -> np.ndarray:
            table = self._read(part, lambda file: file.read(columns=[name], use_threads=False))
            if table.num_rows != part.documents:
                raise self._damaged(part, f"{table.num_rows} rows where {part.documents} should be")
            column: np.ndarray = table.column(name).to_numpy()
            return column

        with ThreadPoolExecutor(_READ_THREADS) as pool:
            return np.concatenate(list(pool.map(read_one, self.parts)))

    def _read(self, part: Part, read: Callable[[pq.ParquetFile], pa.Table]) -> pa.Table:
        path = (self.folder / part.file).path
        try:
            with pq.ParquetFile(
                path, filesystem=self.folder.filesystem, page_checksum_verification=True
            ) as file:
                return read(file)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(part, str(error).splitlines()[0]) from None

    def _damaged(self, part: Part, why: str) -> UserError:
        return UserError(
            f"{self.folder / part.file} is not the part that {MANIFEST} describes: {why}; "
            f"training on it would use other data than recorded; delete {self.folder} and run "
            "preprocess again, or restore the file."
        )


def checksum_of(manifest: Mapping[str, Any]) -> str:
    """Sha256, in hex, of what a manifest says beside its checksum."""
    return digest({key: value for key, value in manifest.items() if key != CHECKSUM})


@dataclass(frozen=True)
class Dataset:
    """A finished dataset: its manifest, its tokenizer, its splits."""

    folder: Location
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Location) -> Dataset:
        """Read the manifest of a dataset's folder; no part is opened.

        Raises:
            UserError: if the folder holds no finished dataset.
        """
        file = folder / MANIFEST
        if not file.is_file():
            raise UserError(
                f"{folder} holds no {MANIFEST}: expected the folder that preprocess printed as "
                "'artifact: FOLDER'; either it is another folder, or preprocess was interrupted: "
                "run its command again."
            )
        manifest = file.read_json()
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(
                f"{file} was written in another format than {FORMAT}, which this version reads: "
                "run preprocess again with this version."
            )
        # Datasets of earlier versions have none.
        if CHECKSUM in manifest and manifest[CHECKSUM] != checksum_of(manifest):
            raise UserError(
                f"{file} is not what preprocess wrote (its checksum is another): training would "
                f"take other data than recorded; restore it, or delete {folder} and run "
                "preprocess again."
            )
        return cls(folder, manifest)

    @property
    def tokenizer_folder(self) -> Location:
        """The folder that `tokenization.load_tokenizer` reads."""
        return self.folder / "tokenizer"

    @property
    def tokenizer_fingerprint(self) -> str:
        """What `tokenization.fingerprint_tokenizer` says of this dataset's tokenizer."""
        fingerprint: str = self.manifest["tokenizer"]["fingerprint"]
        return fingerprint

    @property
    def split_names(self) -> Sequence[str]:
        """The splits that hold documents."""
        splits = self.manifest["splits"]
        return [name for name in SPLITS if name in splits and splits[name]["documents"]]

    def split(self, name: str) -> Split:
        """The split of that name.

        Raises:
            UserError: if the dataset has no such split, or no document in it.
        """
        if name not in self.split_names:
            raise UserError(
                f"the dataset {self.folder} has no documents in a split '{name}': it has "
                f"{', '.join(self.split_names)}; name one of these, or run preprocess with "
                f"corpus.{name}=FILE."
            )
        records = self.manifest["splits"][name]["parts"]
        return Split(name, self.folder, tuple(Part.from_record(record) for record in records))
