"""The preprocess job, killed by SIGKILL when it comes to a given point.

python -m tests.pipeline.kill_preprocess POINT corpus=text ...
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jobs.entry import run_job
from jobs.preprocess import main
from pipeline.artifact import Artifact
from pipeline.corpora import commit as commit_module
from pipeline.corpora import index
from pipeline.corpora.tally import Tally
from pipeline.stages import preprocess
from pipeline.storage import Location


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _dies_after(count: int, values: Iterable[Any]) -> Iterator[Any]:
    for number, value in enumerate(values):
        if number == count:
            die()
        yield value
    die()


def while_indexing() -> None:
    original = index.chunks_of
    index.chunks_of = lambda location: _dies_after(1, original(location))


def while_training_the_tokenizer() -> None:
    original = preprocess.train_bpe
    preprocess.train_bpe = lambda texts, size: original(_dies_after(1, texts), size)


def _at_writing(named: str, half: bool) -> None:
    original = Location.write_bytes

    def write_bytes(self: Location, data: bytes) -> None:
        if self.path.endswith(named):
            if half:
                Path(f"{self.path}.00000000.tmp").write_bytes(data[: len(data) // 2])
            die()
        original(self, data)

    Location.write_bytes = write_bytes  # type: ignore[method-assign]


def while_saving_the_tokenizer() -> None:
    _at_writing("tokenizer/tokenizer_config.json", half=True)


def with_the_tokenizer_unmarked() -> None:
    _at_writing("units/tokenizer.json", half=False)


def while_writing_shards() -> None:
    original, seen = Tally.add, [0]

    def add(self: Tally, record: Any) -> None:
        original(self, record)
        seen[0] += 1
        if seen[0] == 5:
            die()

    Tally.add = add  # type: ignore[method-assign]


def before_the_commit() -> None:
    preprocess.commit = die


def while_writing_the_manifest() -> None:
    _at_writing("/manifest.json", half=True)


def after_the_manifest() -> None:
    commit_module.clear_leftovers = die


def while_clearing() -> None:
    Location.delete_original = Location.delete  # type: ignore[attr-defined]

    def delete(self: Location) -> None:
        Location.delete_original(self)  # type: ignore[attr-defined]
        if ".dead." in self.name:
            die()

    Location.delete = delete  # type: ignore[method-assign]


def before_the_record() -> None:
    original = Artifact.save

    def save(self: Artifact) -> Artifact:
        return die() if self.status == "done" else original(self)

    Artifact.save = save  # type: ignore[method-assign]


POINTS: dict[str, Callable[[], None]] = {
    point.__name__: point
    for point in (
        while_indexing,
        while_training_the_tokenizer,
        while_saving_the_tokenizer,
        with_the_tokenizer_unmarked,
        while_writing_shards,
        before_the_commit,
        while_writing_the_manifest,
        after_the_manifest,
        while_clearing,
        before_the_record,
    )
}

if __name__ == "__main__":
    POINTS[sys.argv.pop(1)]()
    run_job("preprocess", main)
