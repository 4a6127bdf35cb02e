"""How varied texts are, and how alike two sets of texts are, by their n-grams of words.

Words are what white space separates; case and punctuation count. An n-gram never reaches from one
text into the next. Every figure depends on how many texts there are: compare sets of one size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

NGram = tuple[str, ...]


def ngrams(texts: Iterable[str], n: int) -> Iterator[NGram]:
    """All n-grams of all texts, one after the other."""
    for text in texts:
        words = text.split()
        yield from zip(*(words[start:] for start in range(n)), strict=False)


def distinct(texts: Iterable[str], n: int) -> float | None:
    """Distinct n-grams over all n-grams, in (0, 1] (Li et al. 2016); None where there is none."""
    counts = Counter(ngrams(texts, n))
    total = counts.total()
    return len(counts) / total if total else None


def jaccard(texts: Iterable[str], others: Iterable[str], n: int) -> float | None:
    """n-grams that both sets have over those that either has, in [0, 1]."""
    ours, theirs = set(ngrams(texts, n)), set(ngrams(others, n))
    either = len(ours | theirs)
    return len(ours & theirs) / either if either else None


def divergence(texts: Iterable[str], others: Iterable[str], n: int) -> float | None:
    """Jensen–Shannon divergence of the two sets' n-gram frequencies, in [0, log 2] nats.

    ½ KL(P ‖ M) + ½ KL(Q ‖ M), with M = ½ (P + Q): finite for n-grams that one set lacks, so no
    smoothing has to be chosen.
    """
    ours, theirs = Counter(ngrams(texts, n)), Counter(ngrams(others, n))
    if not ours or not theirs:
        return None
    our_total, their_total = ours.total(), theirs.total()
    terms = []
    for ngram in ours.keys() | theirs.keys():
        p, q = ours[ngram] / our_total, theirs[ngram] / their_total
        middle = (p + q) / 2
        terms += [0.5 * x * math.log(x / middle) for x in (p, q) if x > 0]
    return math.fsum(terms)
