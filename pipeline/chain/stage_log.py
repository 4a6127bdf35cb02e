"""What a stage printed, beside its output: `log.txt`."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.secrets import redacted
from pipeline.storage import Location

FILE_NAME = "log.txt"
_UPLOAD_EVERY_S = 10.0


class StageLog:
    """Appends lines; object storage knows no append, so there the file is written anew at times."""

    def __init__(self, output: Location) -> None:
        self._file = output / FILE_NAME
        self._text = read_log(output) if not output.is_local else ""
        self._uploaded = time.monotonic()
        self._is_new = False

    def write(self, line: str) -> None:
        """Add a line, without secrets."""
        line = redacted(line)
        if self._file.is_local:
            path = Path(self._file.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(line + "\n")
            return
        self._text += line + "\n"
        self._is_new = True
        if time.monotonic() - self._uploaded >= _UPLOAD_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Bring what is new to the storage."""
        if self._is_new:
            self._file.write_bytes(self._text.encode())
            self._uploaded, self._is_new = time.monotonic(), False


def read_log(output: Location) -> str:
    """All that was printed; "" when nothing was."""
    file = output / FILE_NAME
    return file.read_bytes().decode(errors="replace") if file.is_file() else ""
