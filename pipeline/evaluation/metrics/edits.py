"""How far a reconstruction is from its source."""

from __future__ import annotations


def relative_edit_distance(text: str, other: str) -> float:
    """Levenshtein distance over words, as a share of the longer text.

    0 where they are equal, 1 where they have nothing in common.
    """
    from nltk import edit_distance

    words, others = text.split(), other.split()
    longer = max(len(words), len(others))
    return float(edit_distance(words, others)) / longer if longer else 0.0
