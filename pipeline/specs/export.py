"""What the export stage does: weights out of a training checkpoint."""

from __future__ import annotations

from typing import Literal

from pipeline.specs.base import Spec


class ExportSpec(Spec):
    """One run of the export stage. Its input is a checkpoint, or the run that has some."""

    # Of a run: its last checkpoint, or the kept one that its validation found best.
    which: Literal["last", "best"] = "last"
