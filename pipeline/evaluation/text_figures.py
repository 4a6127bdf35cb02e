"""Figures of the texts that an evaluation has made, and the few that are shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation.blocks import Arrays, spread_places
from pipeline.evaluation.metrics.errors import mean, perplexity
from pipeline.evaluation.metrics.extras import bertscore, mauve
from pipeline.evaluation.metrics.text_sets import (
    as_figures,
    reconstruction_figures,
    response_figures,
    sample_figures,
)
from pipeline.specs.evaluate import EvaluationSpec
from pipeline.storage import Location

SHOWN_SAMPLES, SHOWN_RECONSTRUCTIONS, SHOWN_SOURCES = 8, 6, 4


def split_references(documents: Sequence[str], num_samples: int) -> tuple[list[str], list[str]]:
    """Real documents to measure beside the samples, and the rest to measure both against.

    The first are as many as samples, or half of what there is; spread over the split, so that both
    are alike.
    """
    count = min(num_samples, len(documents) // 2)
    chosen = set(spread_places(count, len(documents))) if count else set()
    real = [text for place, text in enumerate(documents) if place in chosen]
    return real, [text for place, text in enumerate(documents) if place not in chosen]


def generation_figures(
    samples: Sequence[str], documents: Sequence[str], settings: EvaluationSpec
) -> dict[str, Any]:
    """Figures of samples, and the same of real documents: what a perfect model would get."""
    real, references = split_references(documents, len(samples))
    count = min(len(samples), len(real)) if real else len(samples)
    equals = [references[place] for place in spread_places(count, len(references))]
    tokenizer = settings.bleu_tokenizer
    found: dict[str, Any] = {"num_samples": count, "num_references": len(references)}
    for name, texts in (("samples", list(samples[:count])), ("real", real[:count])):
        if texts:
            pairs = sample_figures(texts, references, equals, tokenizer)
            if settings.mauve_model is not None:
                pairs["mauve"] = (mauve(texts, equals, settings.mauve_model), None)
            found[name] = as_figures(pairs)
    return found


def add_reference_perplexity(generation: dict[str, Any], scored: Mapping[str, Arrays]) -> None:
    """Put in the perplexity of samples and of real documents under the reference model."""
    for name, arrays in scored.items():
        if name in generation:
            value, error = perplexity(arrays["nll"], arrays["num_tokens"])
            generation[name]["reference_ppl"] = value
            generation[name]["standard_errors"]["reference_ppl"] = error


def reconstruction_summary(made: Arrays, settings: EvaluationSpec) -> dict[str, Any]:
    """Figures of the reconstructions."""
    texts, sources = made["text"].tolist(), made["source"].tolist()
    pairs = reconstruction_figures(texts, sources, settings.bleu_tokenizer)
    return {"num_documents": len(texts)} | as_figures(pairs)


def response_summary(made: Arrays, settings: EvaluationSpec) -> dict[str, Any]:
    """Figures of the texts for sources, beside each source's reference."""
    texts, references = made["text"].tolist(), made["reference"].tolist()
    pairs = response_figures(texts, references, settings.bleu_tokenizer)
    if settings.bertscore_model is not None:
        flat = [text for of_one in texts for text in of_one]
        repeated = [r for r, of_one in zip(references, texts, strict=True) for _ in of_one]
        scores = bertscore(flat, repeated, settings.bertscore_model, settings.bertscore_layer)
        pairs["bertscore"] = mean(scores.reshape(made["text"].shape).mean(axis=1))
    counts = {"num_sources": len(texts), "per_source": made["text"].shape[1]}
    return counts | as_figures(pairs)


def shown_texts(results: Mapping[str, Arrays]) -> dict[str, Any]:
    """The texts that a table or a page shows."""
    shown: dict[str, Any] = {"samples": [], "reconstructions": [], "interpolations": []}
    if "samples" in results:
        shown["samples"] = results["samples"]["text"][:SHOWN_SAMPLES].tolist()
    if "reconstructions" in results:
        made = results["reconstructions"]
        chosen = spread_places(SHOWN_RECONSTRUCTIONS, len(made["text"]))
        shown["reconstructions"] = [
            {"source": str(made["source"][i]), "reconstruction": str(made["text"][i])}
            for i in chosen
        ]
    if "responses" in results:
        made = results["responses"]
        shown["answers"] = [
            {
                "source": str(made["source"][i]),
                "reference": str(made["reference"][i]),
                "texts": made["text"][i].tolist(),
            }
            for i in spread_places(SHOWN_SOURCES, len(made["text"]))
        ]
    if "interpolations" in results:
        made = results["interpolations"]
        shown["interpolations"] = [
            {"from": str(ends[0]), "to": str(ends[1]), "texts": texts.tolist()}
            for ends, texts in zip(made["ends"], made["text"], strict=True)
        ]
    return shown


def save_texts(results: Mapping[str, Arrays], file: Location) -> None:
    """Write all texts that were made, a JSON object a line."""
    rows: list[dict[str, Any]] = []
    for place, text in enumerate(results.get("samples", {}).get("text", [])):
        rows.append({"kind": "sample", "place": place, "text": str(text)})
    made = results.get("reconstructions", {})
    for place, source, text in zip(*(made.get(k, []) for k in ("place", "source", "text")),
                                   strict=True):  # fmt: skip
        rows.append(
            {
                "kind": "reconstruction",
                "place": int(place),
                "source": str(source),
                "text": str(text),
            }
        )
    made = results.get("responses", {})
    for place, source, texts in zip(*(made.get(k, []) for k in ("place", "source", "text")),
                                    strict=True):  # fmt: skip
        for text in texts.tolist():
            rows.append(
                {"kind": "response", "place": int(place), "source": str(source), "text": text}
            )
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_bytes("".join(lines).encode())
