"""Every figure of texts against its definition, written out in a few lines."""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache

import numpy as np
import pytest
import sacrebleu

from pipeline.evaluation.metrics.bleu import (
    bleu_of,
    bleu_statistics,
    paired_bleu_statistics,
    self_bleu_statistics,
)
from pipeline.evaluation.metrics.edits import relative_edit_distance
from pipeline.evaluation.metrics.ngrams import distinct, divergence, jaccard
from pipeline.evaluation.metrics.text_sets import (
    as_figures,
    reconstruction_figures,
    response_figures,
    sample_figures,
)
from tests.pipeline.train_data import sentences

TEXTS, OTHERS = sentences(23, 1), sentences(31, 2)


def all_ngrams(texts: list[str], n: int) -> list[str]:
    found = []
    for text in texts:
        words = text.split()
        for start in range(len(words) - n + 1):
            found.append(" ".join(words[start : start + n]))
    return found


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_equals_its_definition(n: int) -> None:
    found = all_ngrams(TEXTS, n)
    assert distinct(TEXTS, n) == len(set(found)) / len(found)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_jaccard_equals_its_definition(n: int) -> None:
    ours, theirs = set(all_ngrams(TEXTS, n)), set(all_ngrams(OTHERS, n))
    both = sum(1 for ngram in ours if ngram in theirs)
    assert jaccard(TEXTS, OTHERS, n) == both / (len(ours) + len(theirs) - both)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_divergence_equals_its_definition(n: int) -> None:
    from scipy.spatial.distance import jensenshannon

    ours, theirs = Counter(all_ngrams(TEXTS, n)), Counter(all_ngrams(OTHERS, n))
    support = sorted(set(ours) | set(theirs))
    p, q = ([counts[ngram] for ngram in support] for counts in (ours, theirs))
    assert divergence(TEXTS, OTHERS, n) == pytest.approx(jensenshannon(p, q) ** 2, rel=1e-9)


def test_ngram_figures_at_their_ends() -> None:
    assert divergence(TEXTS, TEXTS, 2) == 0
    assert divergence(["a b"], ["c d"], 1) == pytest.approx(math.log(2))
    assert jaccard(TEXTS, TEXTS, 3) == 1
    assert jaccard(["a b"], ["c d"], 1) == 0
    assert distinct(["a a a a"], 1) == 0.25
    assert distinct(["a b", "b c"], 2) == 1  # none reaches from one text into the next
    for figure in (distinct(["a"], 2), jaccard(["a"], ["b"], 2), divergence(["a"], ["b"], 2)):
        assert figure is None


def test_bleu_against_all_references_equals_sacrebleus() -> None:
    streams = [[reference] * len(TEXTS) for reference in OTHERS]
    expected = sacrebleu.corpus_bleu(TEXTS, streams).score
    assert 1 < expected < 99
    assert bleu_of(bleu_statistics(TEXTS, OTHERS)) == pytest.approx(expected, rel=1e-9)


def test_self_bleu_equals_sacrebleus_with_each_text_left_out() -> None:
    texts = [*TEXTS[:12], TEXTS[3]]  # one is there twice: its copy stays a reference
    streams = [
        [texts[(own + shift) % len(texts)] for own in range(len(texts))]
        for shift in range(1, len(texts))
    ]
    expected = sacrebleu.corpus_bleu(texts, streams).score
    assert bleu_of(self_bleu_statistics(texts)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("tokenizer", ["13a", "none", "intl", "char"])
def test_paired_bleu_equals_sacrebleus(tokenizer: str) -> None:
    texts = [f"{a} {b}, (so-called)" for a, b in zip(TEXTS, OTHERS, strict=False)]
    expected = sacrebleu.corpus_bleu(texts, [OTHERS[: len(texts)]], tokenize=tokenizer).score
    found = paired_bleu_statistics(texts, OTHERS[: len(texts)], tokenizer)
    assert bleu_of(found) == pytest.approx(expected, rel=1e-9)


def test_edit_distance_equals_its_recursion() -> None:
    @lru_cache
    def plain(a: tuple[str, ...], b: tuple[str, ...]) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(plain(a[1:], b) + 1, plain(a, b[1:]) + 1, plain(a[1:], b[1:]) + (a[0] != b[0]))

    for text, other in zip(TEXTS, OTHERS, strict=False):
        words, others = tuple(text.split()), tuple(other.split())
        expected = plain(words, others) / max(len(words), len(others))
        assert relative_edit_distance(text, other) == expected
    assert relative_edit_distance("", "a b") == 1
    assert relative_edit_distance("", "") == 0
    assert relative_edit_distance("a b c d", "a x c") == 0.5


def test_real_documents_look_more_real_than_noise() -> None:
    noise = [" ".join(np.random.default_rng(i).choice(list("qwxz"), 6)) for i in range(20)]
    good = as_figures(sample_figures(TEXTS[:20], OTHERS, OTHERS[:20], "13a"))
    bad = as_figures(sample_figures(noise, OTHERS, OTHERS[:20], "13a"))
    assert good["bleu"] > bad["bleu"]
    assert good["jaccard_1"] > bad["jaccard_1"]
    assert good["divergence_1"] < bad["divergence_1"]
    assert good["standard_errors"]["bleu"] > 0
    assert good["standard_errors"]["distinct_2"] is None


def test_reconstruction_figures_of_copies_are_perfect() -> None:
    perfect = as_figures(reconstruction_figures(TEXTS, TEXTS, "13a"))
    assert perfect["bleu"] == pytest.approx(100)
    assert perfect["exact_match"] == 1
    assert perfect["edit_distance"] == 0
    half = as_figures(reconstruction_figures([*TEXTS[:3], "", "", ""], TEXTS[:6], "13a"))
    assert half["exact_match"] == 0.5
    assert half["edit_distance"] == 0.5


def test_response_figures_equal_their_definitions() -> None:
    responses = [TEXTS[:3], TEXTS[3:6]]
    references = OTHERS[:2]
    found = as_figures(response_figures(responses, references, "13a"))
    repeated = [references[0]] * 3 + [references[1]] * 3
    expected = sacrebleu.corpus_bleu(TEXTS[:6], [repeated]).score
    assert found["bleu"] == pytest.approx(expected, rel=1e-9)
    unigrams = []
    for text, reference in zip(TEXTS[:6], repeated, strict=True):
        a, b = (Counter(t.replace(".", "").split()) for t in (text, reference))
        unigrams.append(2 * (a & b).total() / (a.total() + b.total()))
    assert found["rouge_1"] == pytest.approx(np.mean(unigrams))
    streams = [
        [of_one[(own + shift) % 3] for of_one in responses for own in range(3)] for shift in (1, 2)
    ]
    among = sacrebleu.corpus_bleu(TEXTS[:6], streams).score
    assert found["self_bleu"] == pytest.approx(among, rel=1e-9)
    assert found["distinct_2"] == distinct(TEXTS[:6], 2)
