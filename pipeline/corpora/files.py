"""The files that a corpus key names: one file, a folder or a glob, local or a URI."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from pyarrow import fs

from pipeline.corpora.units import Format
from pipeline.errors import UserError
from pipeline.storage import Location

SUFFIXES: dict[Format, tuple[str, ...]] = {
    "text": (".txt", ".text"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
    "csv": (".csv",),
}
_GLOB_CHARACTERS = "*?["


@dataclass(frozen=True)
class FoundFile:
    """A file, and what says whether it is still the same one."""

    location: Location
    name: str  # below the folder that was given
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Found:
    """What a corpus key names, in a stable order."""

    files: list[FoundFile]
    skipped: list[str]  # files of a folder whose names say that they hold something else


def find_files(key: str, uri: str, kind: Format) -> Found:
    """List the files that `key=uri` names.

    Raises:
        UserError: if nothing is there, nothing matches, or all files are empty.
    """
    root = Location.parse(uri)
    info = root.info()
    if info.type == fs.FileType.File:
        found = Found([_found(root, info, root.name)], [])
    elif info.type == fs.FileType.Directory:
        found = _in_folder(key, root, kind)
    elif any(character in uri for character in _GLOB_CHARACTERS):
        found = _matching(key, uri, root)
    else:
        raise UserError(
            f"{key}={uri} is not there: expected a file, a folder or a glob; check the path."
        )
    if not any(file.size for file in found.files):
        what = "the file is" if len(found.files) == 1 else f"all {len(found.files)} files are"
        raise UserError(
            f"{key}={uri}: {what} empty, so there is no document in it; check how it was made."
        )
    return found


def _found(location: Location, info: fs.FileInfo, name: str) -> FoundFile:
    return FoundFile(location, name, info.size or 0, info.mtime_ns or 0)


def _below(root: Location) -> list[tuple[str, fs.FileInfo]]:
    """All files below a folder, hidden ones left out, as (name below it, info), by name."""
    selector = fs.FileSelector(root.path, allow_not_found=True, recursive=True)
    prefix = root.path.rstrip("/") + "/"
    named = sorted(
        (info.path.removeprefix(prefix), info)
        for info in root.filesystem.get_file_info(selector)
        if info.type == fs.FileType.File
    )
    return [(name, info) for name, info in named if not re.search(r"(^|/)[._]", name)]


def _in_folder(key: str, root: Location, kind: Format) -> Found:
    endings = tuple(f"{s}{z}" for s in SUFFIXES[kind] for z in ("", ".gz"))
    files = _below(root)
    taken = [_found(root / name, info, name) for name, info in files if name.endswith(endings)]
    skipped = [name for name, _ in files if not name.endswith(endings)]
    if not taken:
        there = f"there is only {', '.join(skipped[:3])}" if skipped else "it holds no files"
        raise UserError(
            f"{key}={root} is a folder without files for corpus={kind} "
            f"({', '.join(SUFFIXES[kind])}, also .gz): {there}; name the files with a glob such "
            f"as {key}={root}/*."
        )
    return Found(taken, skipped)


def _matching(key: str, uri: str, root: Location) -> Found:
    parts = root.path.split("/")
    fixed = next(i for i, part in enumerate(parts) if any(c in part for c in _GLOB_CHARACTERS))
    base = replace(root, path="/".join(parts[:fixed]) or "/")
    pattern = _pattern("/".join(parts[fixed:]))
    files = [
        _found(base / name, info, name) for name, info in _below(base) if pattern.fullmatch(name)
    ]
    if not files:
        raise UserError(f"{key}={uri} matches no file: check the pattern and the folder.")
    return Found(files, [])


def _pattern(glob: str) -> re.Pattern[str]:
    """A glob as a regular expression: `*` and `?` stay within a folder, `**/` does not."""
    out, i = "", 0
    while i < len(glob):
        if glob.startswith("**/", i):
            out, i = out + "(?:.*/)?", i + 3
            continue
        character = glob[i]
        closing = glob.find("]", i + 2)
        if character == "*":
            out += "[^/]*"
        elif character == "?":
            out += "[^/]"
        elif character == "[" and closing > 0:
            inner = glob[i + 1 : closing].replace("\\", "\\\\")
            out += f"[{'^' + inner[1:] if inner[0] == '!' else inner}]"
            i = closing
        else:
            out += re.escape(character)
        i += 1
    return re.compile(out)
