"""Hugging Face data sets: a folder written by `save_to_disk`, a folder of data files, a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.artifact import digest
from pipeline.corpora.checks import sha256_of
from pipeline.corpora.units import HubSlice, InputFile
from pipeline.errors import UserError, first_line
from pipeline.shards import SPLITS
from pipeline.specs import CorpusSpec
from pipeline.storage import Location

# What data sets call the splits, and what we do.
_SPLITS = {"train": "train", "validation": "valid", "valid": "valid", "val": "valid",
           "dev": "valid", "test": "test"}  # fmt: skip
_ON_DISK = ("dataset_dict.json", "dataset_info.json")


@dataclass(frozen=True)
class HubPart:
    """One split: how to load it, and what is known of it without reading it."""

    source: HubSlice
    rows: int
    bytes: int
    schema: pa.Schema


@dataclass(frozen=True)
class HubListing:
    """A data set as the index sees it."""

    slices: dict[str, HubPart]  # by our names of the splits
    files: list[InputFile]
    fingerprint: str
    skipped: list[str]  # splits with other names

    @property
    def bytes(self) -> int:
        """Bytes of the splits' Arrow data."""
        return sum(part.bytes for part in self.slices.values())


def list_splits(corpus: CorpusSpec) -> HubListing:
    """Open a data set and list its splits.

    Raises:
        UserError: if it cannot be loaded, or none of its splits is one that we know.
    """
    path = str(corpus.path)
    folder = Path(path).expanduser()
    is_folder = folder.is_dir()
    on_disk = is_folder and any((folder / name).is_file() for name in _ON_DISK)
    revision = corpus.revision if is_folder else _resolved(path, corpus.revision)
    where = str(folder.absolute()) if is_folder else path
    loaded = load(HubSlice(where, corpus.name, revision, None, on_disk))
    named = dict(loaded) if isinstance(loaded, dict) else {None: loaded}
    slices: dict[str, HubPart] = {}
    for theirs, data in named.items():
        ours = "train" if theirs is None else _SPLITS.get(theirs)
        if ours is None or not len(data):
            continue
        source = HubSlice(where, corpus.name, revision, theirs, on_disk)
        slices[ours] = HubPart(source, len(data), max(data.data.nbytes, 1), data.data.schema)
    if "train" not in slices:
        raise UserError(
            f"corpus.path={path} has no documents in a split 'train': it has "
            f"{', '.join(map(str, named))}; preprocess needs one to train on."
        )
    files = _files(folder) if is_folder else []
    content: Any = [file.sha256 for file in files] if is_folder else [path, revision]
    fingerprint = digest({"content": content, "name": corpus.name})
    skipped = [name for name in named if name is not None and name not in _SPLITS]
    ordered = {name: slices[name] for name in SPLITS if name in slices}
    return HubListing(ordered, files, fingerprint, skipped)


@lru_cache(maxsize=8)
def load(source: HubSlice) -> Any:
    """Load a data set (memory-mapped), or one split of it.

    Raises:
        UserError: if the path or hub id gives none.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        if source.on_disk:
            loaded = datasets.load_from_disk(source.path)
            loaded = loaded if source.split is None else loaded[source.split]
        else:
            loaded = datasets.load_dataset(
                source.path, source.name, revision=source.revision, split=source.split
            )
    except Exception as error:  # datasets raises many kinds, its loaders any
        why = first_line(error)
        raise UserError(
            f"corpus.path={source.path} gives no data set ({why}): expected a folder written by "
            "save_to_disk, a folder of data files, or the id of a data set on the Hugging Face "
            "hub that this machine can reach; corpus.name is its configuration."
        ) from None
    return loaded


def _resolved(path: str, revision: str | None) -> str | None:
    """The commit that a hub id stands for now, so that workers read the same one."""
    from huggingface_hub import HfApi

    try:
        sha: str | None = HfApi().dataset_info(path, revision=revision, timeout=10).sha
    except Exception:  # offline, but perhaps in the cache: loading will tell
        return revision
    return sha


def _files(folder: Path) -> list[InputFile]:
    return [
        InputFile(None, str(f.relative_to(folder)), f.stat().st_size, sha256_of(Location.parse(f)))
        for f in sorted(folder.rglob("*"))
        # datasets keeps results of its own operations beside the data
        if f.is_file() and not f.name.startswith((".", "cache-", "tmp"))
    ]
