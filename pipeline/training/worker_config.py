"""What the driver of a training tells each of its workers."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.progress import ProgressMailbox
from pipeline.specs import TrainSpec
from pipeline.storage import Location


@dataclass(frozen=True)
class WorkerConfig:
    """What the driver tells every worker."""

    spec: TrainSpec
    dataset: Location
    output: Location
    use_gpu: bool
    mailbox: ProgressMailbox | None

    def say(self, text: str) -> None:
        """Have the driver print a sentence."""
        if self.mailbox is not None:
            self.mailbox.say(text)
