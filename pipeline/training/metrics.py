"""The record of a run: `metrics.jsonl`, a row for each report, and TensorBoard events beside it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from pipeline.storage import Location

FILE_NAME = "metrics.jsonl"
SUMMARY = "summary.json"  # what a finished run has to tell
TENSORBOARD = "tensorboard"
# Of a validation's row, what is reported to Ray as `valid_<key>`.
VALID_KEYS = ("negative_elbo", "reconstruction_nll", "kl", "loss", "ppl_token")
_NOT_CURVES = ("kind", "step", "epoch", "kl_per_layer")


class MetricsLog:
    """Appends rows; after a restart it first drops the rows of steps that will be made again.

    On a local disk a row is there at once, for whoever watches the run. Object storage knows no
    append, so there rows come with `flush`, in whole files, before each checkpoint: whatever a
    checkpoint's step has seen is there when the run goes on from it.

    Args:
        output: the run's folder.
        resume_step: the step that the run goes on from; rows of later steps are dropped.
    """

    def __init__(self, output: Location, resume_step: int) -> None:
        self._file = output / FILE_NAME
        self._rows = [row for row in read_rows(output) if row["step"] <= resume_step]
        self._events = _Events(output / TENSORBOARD)
        for row in self._rows:
            self._events.add(row)
        self._file.write_bytes(_lines(self._rows))
        self._events.flush()

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; it needs `kind`, `step` and `epoch`."""
        self._rows.append(row)
        self._events.add(row)
        if self._file.is_local:
            with Path(self._file.path).open("ab") as file:
                file.write(_lines([row]))

    def flush(self) -> None:
        """Bring all rows and events to the storage."""
        if not self._file.is_local:
            self._file.write_bytes(_lines(self._rows))
        self._events.flush()

    def close(self) -> None:
        """Flush and end."""
        self.flush()
        self._events.close()


def read_rows(output: Location) -> list[dict[str, Any]]:
    """The rows of a run's folder; [] before the first. A row cut off by a kill is left out."""
    file = output / FILE_NAME
    if not file.is_file():
        return []
    complete, _, _ = file.read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in complete.splitlines() if line]


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


class _Events:
    """TensorBoard's event file, always written anew from the rows: none is doubled on resume."""

    def __init__(self, folder: Location) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._local = None if folder.is_local else tempfile.TemporaryDirectory()
        folder.delete()
        # A flush comes from outside, so the writer's own timer would only cost.
        self._writer = SummaryWriter(
            folder.path if self._local is None else self._local.name, flush_secs=3600
        )

    def add(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name not in _NOT_CURVES and isinstance(value, int | float):
                self._writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])
        for layer, value in enumerate(row.get("kl_per_layer", ())):
            self._writer.add_scalar(f"{row['kind']}/kl_layer/{layer}", value, row["step"])

    def flush(self) -> None:
        self._writer.flush()
        if self._local is not None:
            self._folder.upload(Path(self._local.name))

    def close(self) -> None:
        self._writer.close()
        if self._local is not None:
            self._folder.upload(Path(self._local.name))
            self._local.cleanup()
