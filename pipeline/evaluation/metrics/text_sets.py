"""The figures of a set of texts together: samples, reconstructions, responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.evaluation.metrics.bleu import (
    bleu_of,
    bleu_statistics,
    paired_bleu_statistics,
    self_bleu_statistics,
)
from pipeline.evaluation.metrics.edits import relative_edit_distance
from pipeline.evaluation.metrics.errors import Pair, bootstrap, mean
from pipeline.evaluation.metrics.ngrams import distinct, divergence, jaccard

ORDERS = (1, 2, 3)


def sample_figures(
    texts: Sequence[str], references: Sequence[str], equals: Sequence[str], tokenizer: str
) -> dict[str, Pair]:
    """Figures of texts that should look like real ones.

    Args:
        texts: the samples.
        references: real documents, as many as there are: for BLEU.
        equals: as many real documents as samples: for figures that depend on how many there are.
        tokenizer: sacrebleu's name of how words are cut.
    """
    found = {
        "bleu": bootstrap(bleu_statistics(texts, references, tokenizer), bleu_of),
        "self_bleu": bootstrap(self_bleu_statistics(texts, tokenizer), bleu_of),
    }
    for n in ORDERS:
        # Resampling repeats texts, and with them n-grams: it gives no error of these.
        found |= {
            f"distinct_{n}": (distinct(texts, n), None),
            f"jaccard_{n}": (jaccard(texts, equals, n), None),
            f"divergence_{n}": (divergence(texts, equals, n), None),
        }
    return found


def reconstruction_figures(
    texts: Sequence[str], sources: Sequence[str], tokenizer: str
) -> dict[str, Pair]:
    """Figures of reconstructions beside what they should be."""
    pairs = list(zip(texts, sources, strict=True))
    equal = np.array([float(text == source) for text, source in pairs])
    edits = np.array([relative_edit_distance(text, source) for text, source in pairs])
    return {
        "bleu": bootstrap(paired_bleu_statistics(texts, sources, tokenizer), bleu_of),
        "exact_match": mean(equal),
        "edit_distance": mean(edits),
    }


def response_figures(
    responses: Sequence[Sequence[str]], references: Sequence[str], tokenizer: str
) -> dict[str, Pair]:
    """Figures of several responses to each source beside the source's one reference.

    BLEU and ROUGE are those of all responses; Self-BLEU is of each response against the others of
    its own source: how little they differ. Errors are over sources.
    """
    flat = [text for of_one in responses for text in of_one]
    repeated = [reference for r, of_one in zip(references, responses, strict=True)
                for reference in [r] * len(of_one)]  # fmt: skip
    per_source = [len(of_one) for of_one in responses]
    against = _by_source(paired_bleu_statistics(flat, repeated, tokenizer), per_source)
    found: dict[str, Pair] = {"bleu": bootstrap(against, bleu_of)}
    if min(per_source) > 1:
        among = [self_bleu_statistics(of_one, tokenizer).sum(axis=0) for of_one in responses]
        found["self_bleu"] = bootstrap(np.array(among), bleu_of)
    for name, values in rouge_scores(flat, repeated).items():
        found[name] = mean(_by_source(values, per_source) / np.array(per_source))
    return found | {f"distinct_{n}": (distinct(flat, n), None) for n in ORDERS}


def rouge_scores(texts: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) of each text, by Google's `rouge-score`."""
    from rouge_score.rouge_scorer import RougeScorer

    names = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
    scorer = RougeScorer(list(names), use_stemmer=False)
    scores = [scorer.score(r, t) for t, r in zip(texts, references, strict=True)]
    return {
        ours: np.array([score[theirs].fmeasure for score in scores])
        for theirs, ours in names.items()
    }


def as_figures(pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """Values by name, and `standard_errors` beside them, as plain JSON values."""
    values = {name: value for name, (value, _) in pairs.items()}
    return values | {"standard_errors": {name: error for name, (_, error) in pairs.items()}}


def _by_source(rows: np.ndarray, per_source: Sequence[int]) -> np.ndarray:
    """Sums of consecutive rows, so many for each source."""
    starts = np.concatenate([[0], np.cumsum(per_source)[:-1]])
    summed: np.ndarray = np.add.reduceat(rows, starts, axis=0)
    return summed
