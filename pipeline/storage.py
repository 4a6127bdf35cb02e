"""Where artifacts live: a local path or any URI that `pyarrow.fs` knows."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import UserError

_CHUNK_BYTES = 4 << 20
_REREADS, _REREAD_S = 20, 0.05  # of a JSON object that is being written


@dataclass(frozen=True)
class Location:
    """A file or folder of some file system.

    `Location.parse("s3://bucket/runs") / "train"` joins; it pickles, so it travels to workers.
    """

    filesystem: fs.FileSystem
    path: str
    scheme: str  # "" for local paths, else "s3", "gs", …
    query: str = ""  # of the URI: which server, region and so on

    @classmethod
    def parse(cls, uri: str | os.PathLike[str]) -> Location:
        """Read a path or a URI.

        Raises:
            UserError: if the URI is not one that pyarrow understands.
        """
        text = os.fspath(uri)
        if "://" not in text:
            return cls(fs.LocalFileSystem(), str(Path(text).expanduser().absolute()), "")
        try:
            filesystem, path = fs.FileSystem.from_uri(text)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise UserError(
                f"'{text}' is not a location that can be opened: expected a path or a URI such as "
                f"s3://bucket/folder ({error})."
            ) from None
        scheme, _, query = text.split("://", 1)[0], *text.partition("?")[1:]
        return cls(filesystem, path, "" if scheme == "file" else scheme, query)

    def __truediv__(self, name: str) -> Location:
        """What lies below this: nothing that is written below a storage can leave it.

        Raises:
            UserError: if the name leads out of it.
        """
        require_below(name, self)
        return replace(self, path=f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        """What `parse` reads; without a user's name and password, which belong into no log."""
        if not self.scheme:
            return self.path
        return f"{self.scheme}://{self.path}" + (f"?{self.query}" if self.query else "")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def parent(self) -> Location:
        """The folder that holds this."""
        return replace(self, path=self.path.rstrip("/").rsplit("/", 1)[0])

    @property
    def is_local(self) -> bool:
        """Whether this lies on a file system of this machine (or mounted on it)."""
        return not self.scheme

    def info(self) -> fs.FileInfo:
        """Type, size in bytes and modification time."""
        return self.filesystem.get_file_info(self.path)

    def exists(self) -> bool:
        """Whether a file or folder is there."""
        return self.info().type != fs.FileType.NotFound

    def is_file(self) -> bool:
        """Whether a file is there."""
        return self.info().type == fs.FileType.File

    def children(self, recursive: bool = False) -> list[Location]:
        """Files and folders below this folder, by name; empty when it is not there."""
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
        found = sorted(info.path for info in self.filesystem.get_file_info(selector))
        return [replace(self, path=path) for path in found]

    def make_folder(self) -> Location:
        """Create this folder and those above it; return it."""
        self.filesystem.create_dir(self.path, recursive=True)
        return self

    def delete(self) -> None:
        """Delete this file or folder, if it is there."""
        kind = self.info().type
        if kind == fs.FileType.Directory:
            self.filesystem.delete_dir(self.path)
        elif kind == fs.FileType.File:
            self.filesystem.delete_file(self.path)

    def read_bytes(self) -> bytes:
        """Read the whole file."""
        with self.filesystem.open_input_stream(self.path, compression=None) as stream:
            return stream.read()

    def chunks(self) -> Iterator[bytes]:
        """Read the file from beginning to end, a few megabytes at a time."""
        with self.filesystem.open_input_stream(self.path, compression=None) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk

    def sha256(self) -> str:
        """Checksum of the file's content, in hex."""
        found = hashlib.sha256()
        for chunk in self.chunks():
            found.update(chunk)
        return found.hexdigest()

    def write_bytes(self, data: bytes) -> None:
        """Write the whole file; it is the old content or the new, never half of it."""
        self.filesystem.create_dir(self.parent.path, recursive=True)
        if not self.is_local:  # an object appears when its upload is complete
            with self.filesystem.open_output_stream(self.path, compression=None) as stream:
                stream.write(data)
            return
        temporary = Path(f"{self.path}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def read_json(self) -> Any:
        """Read a JSON file.

        From object storage it comes in two requests, its size and its bytes. Written anew between
        them it reads as torn or not at all, so there it is read again for a while.

        Raises:
            FileNotFoundError: if it is not there.
            UserError: if the content is not JSON.
        """
        for _ in range(0 if self.is_local else _REREADS):
            try:
                return json.loads(self.read_bytes())
            except FileNotFoundError:
                raise
            except (ValueError, OSError):
                time.sleep(_REREAD_S)
        try:
            return json.loads(self.read_bytes())
        except ValueError as error:
            raise UserError(
                f"{self} should hold JSON but does not ({error}): it was damaged or edited; "
                "restore it, or delete its folder and run the stage again."
            ) from None

    def write_json(self, value: Any) -> None:
        """Write a value as indented JSON, atomically."""
        self.write_bytes(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")

    def move_to(self, target: Location) -> None:
        """Move a file or folder to `target` on the same file system."""
        self.filesystem.create_dir(target.parent.path, recursive=True)
        self.filesystem.move(self.path, target.path)

    def upload(self, folder: Path) -> None:
        """Copy a local folder's content into this one."""
        self.make_folder()
        fs.copy_files(
            str(folder), self.path, fs.LocalFileSystem(), self.filesystem, use_threads=True
        )

    def download(self, folder: Path) -> Path:
        """Copy this folder's content into a local one; return that.

        Raises:
            UserError: if an object's name leads out of the folder.
        """
        prefix = f"{self.path.rstrip('/')}/"
        for child in self.children(recursive=True):
            require_below(child.path.removeprefix(prefix), self)
        folder.mkdir(parents=True, exist_ok=True)
        fs.copy_files(
            self.path, str(folder), self.filesystem, fs.LocalFileSystem(), use_threads=True
        )
        return folder


def require_below(name: str, folder: object) -> None:
    """Check that a name below a folder stays below it.

    Raises:
        UserError: if it is absolute, empty or has a part `..`.
    """
    parts = name.replace("\\", "/").split("/")
    if not parts[0] or ".." in parts or "\0" in name:
        raise UserError(
            f"'{name}' is no name below {folder}: expected one without '..' that does not begin "
            "with '/', so that nothing is read or written outside of that folder; rename it."
        )


def local_copy(location: Location, cache: Path) -> Path:
    """Return a local path with `location`'s content: itself when local, else a copy in `cache`."""
    if location.is_local:
        return Path(location.path)
    return location.download(cache / location.name)
