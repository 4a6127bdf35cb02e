"""Texts that an evaluation shows: what the prior yields, and what reconstruction keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.generation import Decoding, reconstruct_documents, sample_texts
from pipeline.specs.evaluate import EvaluationSpec
from pipeline.tokenization import encoder_of

if TYPE_CHECKING:
    from della_model import Della


def sampled_and_reconstructed(
    model: Della,
    tokenizer: Any,
    sources: Sequence[NDArray[np.int32]],
    settings: EvaluationSpec,
) -> dict[str, Any]:
    """Figures `samples` (texts) and `reconstructions` (pairs of source and reconstruction).

    Samples are drawn within probability mass `sample_top_p`; reconstructions are greedy from the
    posterior's mean, and may be as long as their sources.
    """
    decoding = Decoding(
        max_tokens=settings.sample_max_tokens, temperature=1.0, top_p=settings.sample_top_p
    )
    longest = max([settings.sample_max_tokens, *map(len, sources)])
    greedy = replace(decoding, max_tokens=longest, temperature=0.0)
    encoder = encoder_of(tokenizer)
    rebuilt = reconstruct_documents(model, tokenizer, sources, settings.seed, greedy)
    return {
        "samples": sample_texts(model, tokenizer, settings.num_samples, settings.seed, decoding),
        "reconstructions": [
            {"source": encoder.decode(source), "reconstruction": text}
            for source, text in zip(sources, rebuilt, strict=True)
        ],
    }
