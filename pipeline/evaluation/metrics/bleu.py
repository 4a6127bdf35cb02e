"""BLEU with many references, by sacrebleu's definition and its own last step.

sacrebleu looks at every reference anew for each hypothesis: a thousand samples against a test set
of thousands would take hours. What BLEU needs of references is, for each n-gram, the most that
one of them holds, and the length nearest to the hypothesis. Both are gathered once here; sacrebleu
cuts texts into words and turns counts into the score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.metrics.ngrams import NGram

MAX_ORDER = 4
Statistics = NDArray[np.int64]  # [hypotheses, 2 + 2 · 4]: lengths, then matches and totals by order


class References:
    """References that any hypothesis may match: their counts and lengths, gathered once."""

    def __init__(self, texts: Sequence[str], tokenizer: str = "13a") -> None:
        self._tokenizer = tokenizer
        self._lengths: Counter[int] = Counter()
        # The most that one text holds of each n-gram, which text that is, and the most of the rest.
        self._most: dict[NGram, tuple[int, int, int]] = {}
        for owner, text in enumerate(texts):
            counts, length = counted(text, tokenizer)
            self._lengths[length] += 1
            for ngram, count in counts.items():
                most, of, second = self._most.get(ngram, (0, -1, 0))
                self._most[ngram] = (
                    (count, owner, most) if count > most else (most, of, max(second, count))
                )

    def statistics(self, hypothesis: str, without: int | None = None) -> list[int]:
        """BLEU's counts of one hypothesis; `without` leaves one of the references out."""
        counts, length = counted(hypothesis, self._tokenizer)
        left_out = length if without is not None else None
        matches, totals = [0] * MAX_ORDER, [0] * MAX_ORDER
        for ngram, count in counts.items():
            most, owner, second = self._most.get(ngram, (0, -1, 0))
            order = len(ngram) - 1
            totals[order] += count
            matches[order] += min(count, second if owner == without else most)
        return [length, self._closest(length, left_out), *matches, *totals]

    def _closest(self, length: int, left_out: int | None) -> int:
        """The reference length nearest to `length`, the shorter of two: `left_out` counts less."""
        there = (n for n, count in self._lengths.items() if count > (n == left_out))
        return min(there, key=lambda n: (abs(n - length), n), default=0)


def counted(text: str, tokenizer: str) -> tuple[Counter[NGram], int]:
    """All n-grams of a text up to the fourth order, and its length in words."""
    from sacrebleu.metrics.helpers import extract_all_word_ngrams

    cut: str = _word_cutter(tokenizer)(text.rstrip())
    counts, length = extract_all_word_ngrams(cut, 1, MAX_ORDER)
    return counts, length


@lru_cache
def _word_cutter(tokenizer: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize=tokenizer).tokenizer


def bleu_statistics(
    hypotheses: Sequence[str], references: Sequence[str], tokenizer: str = "13a"
) -> Statistics:
    """Counts of each hypothesis against all of the references."""
    table = References(references, tokenizer)
    return np.array([table.statistics(text) for text in hypotheses], np.int64)


def self_bleu_statistics(texts: Sequence[str], tokenizer: str = "13a") -> Statistics:
    """Counts of each text against all of the others."""
    table = References(texts, tokenizer)
    return np.array([table.statistics(text, own) for own, text in enumerate(texts)], np.int64)


def paired_bleu_statistics(
    hypotheses: Sequence[str], references: Sequence[str], tokenizer: str = "13a"
) -> Statistics:
    """Counts of each hypothesis against the reference of its own."""
    pairs = zip(hypotheses, references, strict=True)
    return np.array([References([r], tokenizer).statistics(h) for h, r in pairs], np.int64)


def bleu_of(statistics: Statistics) -> float:
    """Corpus BLEU in percent: sacrebleu's, of the sum of all hypotheses' counts."""
    from sacrebleu.metrics.bleu import BLEU

    length, reference_length, *counts = (int(n) for n in statistics.sum(axis=0))
    score: float = BLEU.compute_bleu(
        correct=counts[:MAX_ORDER],
        total=counts[MAX_ORDER:],
        sys_len=length,
        ref_len=reference_length,
        smooth_method="exp",
    ).score
    return score
