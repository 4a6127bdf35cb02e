"""What is checked of a source as a whole: its bytes, its columns, whether it is all there."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from pipeline.errors import UserError, first_line, nearest
from pipeline.storage import Location


def chunks_of(location: Location) -> Iterator[bytes]:
    """Read a file from beginning to end.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        yield from location.chunks()
    except OSError as error:
        raise _unreadable(location, error) from None


def sha256_of(location: Location) -> str:
    """Checksum of a file's content, in hex.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return location.sha256()
    except OSError as error:
        raise _unreadable(location, error) from None


def _unreadable(location: Location, error: OSError) -> UserError:
    return UserError(f"{location} cannot be read ({error}): check its permissions and the storage.")


def require_text_column(source: str, name: str, schema: pa.Schema) -> None:
    """Check that a table has a column of that name, and that it holds text.

    Raises:
        UserError: naming the columns there are, or the type that the column has.
    """
    if name not in schema.names:
        raise UserError(
            f"{source} has no column '{name}'{nearest(name, schema.names)}: its columns are "
            f"{', '.join(schema.names)}; set corpus.text_field (of a source: corpus.source_field) "
            "to the one that holds it."
        )
    kind = schema.field(name).type
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = (
        pa.types.is_string(inner) or pa.types.is_large_string(inner) or inner == pa.string_view()
    )
    if not is_text:
        raise UserError(
            f"{source}: the column '{name}' holds {kind}, but a document is text; set "
            "corpus.text_field or corpus.source_field to a column of strings."
        )


def damaged(source: str, what: str, error: BaseException) -> UserError:
    """The error for a file that is cut off or corrupt."""
    why = first_line(error).rstrip(".")
    return UserError(
        f"{source} is no whole {what} file ({why}): it was cut off or damaged, and reading on "
        "would lose documents; fetch or write it again, or take it out of the corpus."
    )
