"""Whole lines out of a stream, in pieces of about a megabyte, whatever their length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

READ_BYTES = 1 << 20
HEAD_BYTES = 400


@dataclass(frozen=True)
class Lines:
    """Consecutive lines without their ends; what is no UTF-8 stands as surrogates."""

    first_line: int
    texts: list[str]


@dataclass(frozen=True)
class LongLine:
    """A line that was skipped over, for it is longer than anyone wants to hold."""

    line: int
    head: bytes


def whole_lines(
    stream: pa.NativeFile, length: int | None, first_line: int, longest: int
) -> Iterator[Lines | LongLine]:
    """Read lines to the end of the stream, or for `length` bytes.

    Args:
        stream: bytes, from where the first line begins.
        length: bytes to read; None: all.
        first_line: number of the first line.
        longest: bytes above which a line may be skipped over (a shorter one never is).
    """
    line, rest, skipping = first_line, b"", False
    for data in _reads(stream, length):
        if skipping:
            newline = data.find(b"\n")
            if newline < 0:
                continue
            data, skipping, line = data[newline + 1 :], False, line + 1
        data = rest + data
        cut = data.rfind(b"\n") + 1
        rest = data[cut:]
        if cut:
            lines = _decoded(data[: cut - 1], line)
            yield lines
            line += len(lines.texts)
        if len(rest) > longest:
            yield LongLine(line, rest[:HEAD_BYTES])
            rest, skipping = b"", True
    if rest:
        yield _decoded(rest, line)


def _reads(stream: pa.NativeFile, length: int | None) -> Iterator[bytes]:
    left = length
    while left is None or left > 0:
        data: bytes = stream.read(READ_BYTES if left is None else min(READ_BYTES, left))
        if not data:
            return
        if left is not None:
            left -= len(data)
        yield data


def _decoded(data: bytes, first_line: int) -> Lines:
    text = data.decode("utf-8", "surrogateescape")
    if first_line == 1:
        text = text.removeprefix("\ufeff")  # byte order mark
    texts = text.split("\n")
    if "\r" in text:
        texts = [line.removesuffix("\r") for line in texts]
    return Lines(first_line, texts)
