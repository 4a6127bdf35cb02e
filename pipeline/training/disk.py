"""A disk that is full, as one sentence."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import UserError, first_line
from pipeline.storage import Location

# Below this, a disk counts as full when writing to it has failed without saying why: torch's
# writer of checkpoints raises a RuntimeError that names no cause.
_FULL_BELOW_BYTES = 8 << 20


@contextmanager
def full_disk_explained(folder: Location | Path, kept: Callable[[], str]) -> Iterator[None]:
    """Turn the failure of a write into a sentence where the disk is full.

    Args:
        folder: where the body writes.
        kept: what is left of the run, for the sentence.

    Raises:
        UserError: if the disk is full, or a quota used up.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not _is_full(error, folder):
            raise
        raise UserError(
            f"the disk of {folder} is full ({first_line(error)}): training stops, since it could "
            f"not be resumed from here; {kept()}; free some space or lower train.keep_checkpoints, "
            "then give the same command again."
        ) from error


def _is_full(error: BaseException, folder: Location | Path) -> bool:
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return True
    if isinstance(folder, Location) and not folder.is_local:
        return False
    path = Path(folder.path) if isinstance(folder, Location) else folder
    while not path.exists():
        path = path.parent
    return isinstance(error, RuntimeError) and shutil.disk_usage(path).free < _FULL_BELOW_BYTES
