"""What became of a corpus so far, and whether too much of it was rejected."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from pipeline.corpora.index import CorpusIndex
from pipeline.corpora.units import Unit
from pipeline.corpora.writing import UnitRecord
from pipeline.errors import UserError
from pipeline.storage import Location


class Tally:
    """Adds up the records of units.

    Args:
        units: all units of the corpus.
        max_rejected: share of the documents that may be rejected.
    """

    def __init__(self, units: Sequence[Unit], max_rejected: float) -> None:
        self._units = {unit.number: unit for unit in units}
        self._max_rejected = max_rejected
        # Documents that the units to come can hold at most: infinite when nobody knows.
        self._to_come = {u.number: math.inf if u.lines is None else u.lines for u in units}
        self.records: list[UnitRecord] = []
        self.bytes_done = self.documents = self.tokens = self.num_rejected = 0
        self._rejected: Counter[str] = Counter()
        self._examples: dict[str, tuple[int, str, int]] = {}  # unit, file, line

    def add(self, record: UnitRecord) -> None:
        """Count one unit; the same unit is never counted twice."""
        if self._to_come.pop(record.number, None) is None:
            return
        self.records.append(record)
        self.bytes_done += self._units[record.number].bytes
        self.documents += record.documents
        self.tokens += record.tokens
        self.num_rejected += record.num_rejected
        self._rejected.update(record.rejected)
        for reason, (file, line) in record.examples.items():
            found = (record.number, file, line)
            self._examples[reason] = min(self._examples.get(reason, found), found)

    def refuse_too_many_rejected(self, folder: Location) -> None:
        """Stop when more documents are rejected than may be, whatever is still to come.

        Raises:
            UserError: with the commonest reason and where it was met first.
        """
        known = self.documents + self.num_rejected
        if self.num_rejected <= self._max_rejected * (known + sum(self._to_come.values())):
            return
        reason, count = self._rejected.most_common(1)[0]
        _, file, line = self._examples[reason]
        so_far = " so far" if self._to_come else ""
        raise UserError(
            f"{self.num_rejected:,} of {known:,} documents{so_far} were rejected, more than "
            f"corpus.max_rejected={self._max_rejected:g} of them; the commonest reason is "
            f"'{reason}' ({count:,}), for example at {file}:{line}; all are listed in "
            f"{folder}; mend them, or raise corpus.max_rejected to go on without them."
        )

    def refuse_empty_split(self, index: CorpusIndex) -> None:
        """Stop when a split that was given has no document left.

        Splits that a hash deals out may be empty, except the one to train on.

        Raises:
            UserError: naming the split.
        """
        filled = {name for record in self.records for name in record.parts}
        for split in ("train",) if index.by_hash else index.splits:
            if split not in filled:
                blank = sum(record.blank for record in self.records)
                raise UserError(
                    f"corpus.{split} has no document left: of the whole corpus {blank:,} lines "
                    f"are blank and {self.num_rejected:,} were rejected; a split needs at least "
                    "one, check its files."
                )
