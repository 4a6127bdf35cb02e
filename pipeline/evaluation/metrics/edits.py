"""How far a reconstruction is from its source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def edit_distance(words: Sequence[str], others: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions of words between two texts (Levenshtein)."""
    codes: dict[str, int] = {}
    first = np.array([codes.setdefault(word, len(codes)) for word in words], np.int64)
    second = np.array([codes.setdefault(word, len(codes)) for word in others], np.int64)
    along = np.arange(len(second) + 1)
    row = along.copy()
    for place, code in enumerate(first, start=1):
        best = np.empty_like(row)
        best[0] = place
        best[1:] = np.minimum(row[:-1] + (second != code), row[1:] + 1)
        # Insertions run along the row: the least over all starts of (cost there + steps from it).
        row = np.minimum.accumulate(best - along) + along
    return int(row[-1])


def relative_edit_distance(text: str, other: str) -> float:
    """Edit distance over words, as a share of the longer text: 0 equal, 1 nothing in common."""
    words, others = text.split(), other.split()
    longer = max(len(words), len(others))
    return edit_distance(words, others) / longer if longer else 0.0
