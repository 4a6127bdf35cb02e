"""Texts that an evaluation makes: of the prior, through the posterior, and between documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.blocks import Arrays
from pipeline.evaluation.likelihood import posterior_means
from pipeline.evaluation.reading import Document, make_batch, make_batches
from pipeline.generation import Decoding, decode_latents, sample_texts, target_texts
from pipeline.specs.evaluate import EvaluationSpec
from pipeline.tokenization import encoder_of

if TYPE_CHECKING:
    from della_model import Della, Reading

INTERPOLATION_STEPS = 7  # both ends among them


def sampled(
    model: Della, tokenizer: Any, first: int, count: int, settings: EvaluationSpec
) -> Arrays:
    """Texts drawn from the prior, within probability mass `sample_top_p`."""
    decoding = Decoding(max_tokens=settings.sample_max_tokens, top_p=settings.sample_top_p)
    texts = sample_texts(
        model, tokenizer, count, settings.seed, decoding, batch_size=count, first=first
    )
    return {"text": as_array(texts)}


def sampled_for_sources(
    model: Della,
    tokenizer: Any,
    documents: Sequence[Document],
    first: int,
    settings: EvaluationSpec,
) -> Arrays:
    """As `sampled`, a text for the source of each document; `first` is the number of the first."""
    decoding = Decoding(max_tokens=settings.sample_max_tokens, top_p=settings.sample_top_p)
    sources = [document.condition for document in documents if document.condition is not None]
    numbers = range(first, first + len(sources))
    texts = target_texts(model, tokenizer, sources, settings.seed, decoding, numbers)
    return {"text": as_array(texts)}


def responses(
    model: Della,
    tokenizer: Any,
    documents: Sequence[Document],
    first: int,
    settings: EvaluationSpec,
) -> Arrays:
    """Several texts for the source of each document, [documents, responses]; of conditional data.

    `first` is the number of the first document among those that are asked for.
    """
    count = settings.responses_per_source
    decoding = Decoding(max_tokens=settings.sample_max_tokens, top_p=settings.sample_top_p)
    rows = []
    for number, document in enumerate(documents, start=first):
        assert document.condition is not None
        # Behind the numbers of the samples, so that none is drawn twice.
        start = settings.num_samples + number * count
        numbers = range(start, start + count)
        sources = [document.condition] * count
        rows.append(target_texts(model, tokenizer, sources, settings.seed, decoding, numbers))
    encoder = encoder_of(tokenizer)
    sources = [d.condition for d in documents if d.condition is not None]
    return {
        "place": np.array([document.place for document in documents]),
        "source": as_array([encoder.decode(source).strip() for source in sources]),
        "reference": as_array(document_texts(tokenizer, documents)),
        "text": as_array(rows),
    }


def reconstructed(
    model: Della, tokenizer: Any, documents: Sequence[Document], settings: EvaluationSpec
) -> Arrays:
    """Documents and what they become: greedy from the posterior's mean, up to their own length."""
    texts = [""] * len(documents)
    for batch in make_batches(documents, settings.batch_tokens, model.device):
        chosen = [documents[row] for row in batch.rows]
        longest = max(len(document.tokens) for document in chosen)
        batch = batch.read_by(model)
        means, condition = posterior_means(model, batch), batch.inputs.get("condition")
        found = _greedy(model, tokenizer, means, longest, batch.places, condition)
        for row, text in zip(batch.rows, found, strict=True):
            texts[row] = text
    return {
        "place": np.array([document.place for document in documents]),
        "source": as_array(document_texts(tokenizer, documents)),
        "text": as_array(texts),
    }


def interpolated(
    model: Della,
    tokenizer: Any,
    pairs: Sequence[tuple[Document, Document]],
) -> Arrays:
    """Texts on the way from one document's latents to another's, greedy; [pairs, steps].

    z(t) = (1 − t) z_a + t z_b between the posterior means, in all layers at once.
    """
    from della_model.texts import interpolated as on_the_way

    rows = []
    for ends in pairs:
        a, b = posterior_means(model, make_batch(ends, model.device))
        path = on_the_way(a, b, INTERPOLATION_STEPS)
        places = np.full(len(path), ends[0].place)
        longest = max(len(end.tokens) for end in ends)
        rows.append(_greedy(model, tokenizer, path, longest, places))
    sources = [document_texts(tokenizer, pair) for pair in pairs]
    return {"text": as_array(rows), "ends": as_array(sources)}


def document_texts(tokenizer: Any, documents: Sequence[Document]) -> list[str]:
    """Documents as text, as their decoding gives it."""
    encoder = encoder_of(tokenizer)
    return [encoder.decode(document.tokens).strip() for document in documents]


def as_array(texts: Any) -> NDArray[np.str_]:
    """Texts as an array that can be saved without pickling."""
    return np.array(texts, dtype=np.str_)


def _greedy(
    model: Della,
    tokenizer: Any,
    latents: Any,
    max_tokens: int,
    places: NDArray[np.int64],
    condition: Reading | None = None,
) -> list[str]:
    decoding = Decoding(max_tokens=max_tokens, temperature=0.0)
    return decode_latents(model, tokenizer, latents, decoding, 0, places, condition)
