"""CSV, whose quoted fields may hold line ends; so a file is read from its beginning."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.corpora.lines import LongLine, whole_lines
from pipeline.corpora.units import Rejection
from pipeline.errors import UserError, nearest

ROWS_AT_ONCE = 4096
# A field or line beyond this is taken for a quote that nobody closed.
LONGEST_BYTES = 1 << 26
EXCERPT_CHARACTERS = 80


@dataclass
class Rows:
    """The text field of consecutive rows, with the line that each begins on."""

    texts: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)


def read_csv(stream: pa.NativeFile, source: str, text_field: str) -> Iterator[Rows]:
    """Read the column `text_field`; the first row names the columns.

    Raises:
        UserError: if there is no such column, or a quote is never closed.
    """
    csv.field_size_limit(LONGEST_BYTES)
    reader = csv.reader(_raw_lines(stream, source), strict=True)
    header = next(reader, [])
    if text_field not in header:
        raise UserError(
            f"{source} has no column '{text_field}'{nearest(text_field, header)}: its first row "
            f"names {', '.join(header[:20])}; set corpus.text_field to the one with the text."
        )
    column = header.index(text_field)
    rows = Rows()
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error) or "field limit" in str(error):
                raise UserError(
                    f"{source}: the row that begins on line {line} has a quote that is never "
                    f"closed ({error}), so the rest of the file cannot be told apart; mend it."
                ) from None
            rows.rejected.append(Rejection(line, "broken CSV row", str(error)))
            continue
        if row is None:
            break
        if len(row) > column:
            rows.texts.append(row[column])
            rows.lines.append(line)
        elif row:  # a blank line gives an empty row
            start = ",".join(row)[:EXCERPT_CHARACTERS].encode("utf-8", "backslashreplace").decode()
            rows.rejected.append(Rejection(line, f"no field '{text_field}'", start))
        else:
            rows.texts.append("")
            rows.lines.append(line)
        if len(rows.texts) + len(rows.rejected) >= ROWS_AT_ONCE:
            yield rows
            rows = Rows()
    yield rows


def _raw_lines(stream: pa.NativeFile, source: str) -> Iterator[str]:
    for piece in whole_lines(stream, None, 1, LONGEST_BYTES):
        if isinstance(piece, LongLine):
            raise UserError(
                f"{source}: line {piece.line} is longer than {LONGEST_BYTES} bytes, which no row "
                "of a CSV file should be; is it another format?"
            )
        for text in piece.texts:
            yield text + "\n"
