"""The evaluate stage: figures of trained weights on a split, spread over Ray actors."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console

from pipeline.cluster import connected, require_shared_storage
from pipeline.errors import UserError
from pipeline.evaluation.blocks import (
    Arrays,
    Block,
    cut_blocks,
    joined,
    load_arrays,
    save_arrays,
)
from pipeline.evaluation.figures import (
    curve_figures,
    mutual_information,
    probe_figures,
    projection,
    summarize,
)
from pipeline.evaluation.metrics.extras import require_extras
from pipeline.evaluation.reading import DocumentReader
from pipeline.evaluation.spread import evaluated, plan_workers, started
from pipeline.evaluation.table import print_evaluation
from pipeline.evaluation.text_figures import (
    add_reference_perplexity,
    generation_figures,
    reconstruction_summary,
    response_summary,
    save_texts,
    shown_texts,
    split_references,
)
from pipeline.evaluation.texts import as_array, document_texts
from pipeline.evaluation.worker import REFERENCE_TEXTS, plan_blocks
from pipeline.progress import Progress
from pipeline.shards import Dataset, Split
from pipeline.specs import EvaluateSpec
from pipeline.specs.evaluate import EvaluationSpec
from pipeline.storage import Location
from pipeline.weights import (
    check_tokenizer,
    load_config,
    load_weights_tokenizer,
    resolve_weights,
)

DOCUMENTS = "documents.parquet"
TEXTS = "texts.jsonl"
BLOCKS = "blocks"

# Measurement -> what its progress bar says, and what is counted.
_SHOWN = {
    "documents": ("likelihood", "documents"),
    "curve": ("bound by number of samples", "documents"),
    "probe": ("probe layers", "documents"),
    "samples": ("sample", "texts"),
    "reconstructions": ("reconstruct", "texts"),
    "interpolations": ("interpolate", "paths"),
    "responses": ("answer sources", "sources"),
    "mutual_information": ("mutual information", "documents"),
    "reference": ("reference model", "texts"),
}


def run_evaluate(
    spec: EvaluateSpec, inputs: dict[str, Location], output: Location
) -> dict[str, Any]:
    """Evaluate `inputs["weights"]` on a split of `inputs["dataset"]`.

    Writes `documents.parquet`, a row a document, and `texts.jsonl`, the texts that were made.
    Finished blocks lie in `blocks/` until all are done, so an interrupted evaluation goes on from
    them.

    Returns:
        The figures that `docs/evaluation.md` defines. Nats a document, with standard errors over
        documents.

    Raises:
        UserError: if weights, dataset and split do not fit each other, a package is missing, or the
            cluster has not what was asked for.
    """
    require_extras(spec.evaluate)
    weights = resolve_weights(inputs["weights"])
    dataset = Dataset.open(inputs["dataset"])
    check_tokenizer(weights, dataset)
    split = dataset.split(spec.split)
    num_documents = min(split.num_documents, spec.evaluate.max_documents or split.num_documents)
    _check_lengths(weights, split, num_documents)

    with connected(spec.cluster):
        require_shared_storage(output)
        results = _measure(spec.evaluate, weights, split, num_documents, output / BLOCKS)
    words = split.num_words_per_document()[:num_documents].astype(np.int64)
    figures = _figures(spec.evaluate, split, results, words)
    save_documents(results["documents"], _document_ids(split, num_documents), words, output)
    save_texts(results, output / TEXTS)
    (output / BLOCKS).delete()
    print_evaluation(figures, Console())
    return figures


def _check_lengths(weights: Location, split: Split, num_documents: int) -> None:
    config = load_config(weights)
    if config.conditional != split.is_conditional:
        has, needs = ("no sources", "with") if config.conditional else ("sources", "without")
        raise UserError(
            f"the documents of the split '{split.name}' have {has}, but the model was trained on "
            f"documents {needs} them: its likelihood would be another's; give a dataset that was "
            f"made {needs} corpus.source_field."
        )
    context = config.context
    lengths = split.lengths()
    if not config.adapter.is_encoder_decoder:
        lengths = lengths + split.condition_lengths()
    lengths = np.maximum(lengths, split.condition_lengths())[:num_documents]
    too_long = np.flatnonzero(lengths > context)
    if len(too_long):
        worst = int(lengths.argmax())
        raise UserError(
            f"{len(too_long)} documents of the split '{split.name}' are longer than the model's "
            f"context of {context} tokens (document {worst} has {lengths[worst]}): they cannot be "
            f"evaluated whole; preprocess with corpus.max_tokens={context}, or train with a larger "
            "model.context."
        )


def _measure(
    settings: EvaluationSpec,
    weights: Location,
    split: Split,
    num_documents: int,
    folder: Location,
) -> dict[str, Arrays]:
    """The results of all measurements, each over all of its items in their order."""
    planned = plan_blocks(settings, load_config(weights), num_documents)
    workers = plan_workers(settings, max(len(blocks) for blocks in planned.values()))
    results: dict[str, Arrays] = {}
    with started(workers, weights, split, num_documents, settings) as actors:
        for name, blocks in planned.items():
            given = results["documents"] if name == "mutual_information" else None
            results[name] = _measured(name, blocks, actors, folder, given)
        if "samples" in results:
            tokenizer = load_weights_tokenizer(weights)
            documents = DocumentReader(split).read(range(num_documents))
            results["texts"] = {"text": as_array(document_texts(tokenizer, documents))}
            if settings.reference_model is not None:
                results |= _judged(results, actors, folder)
    return results


def _judged(results: dict[str, Arrays], actors: list[Any], folder: Location) -> dict[str, Arrays]:
    """Samples, and as many real documents, under the reference model."""
    samples = results["samples"]["text"]
    real, _ = split_references(results["texts"]["text"].tolist(), len(samples))
    texts = [*samples.tolist(), *real]
    blocks = cut_blocks("reference", len(texts), REFERENCE_TEXTS)
    scored = _measured("reference", blocks, actors, folder, {"text": as_array(texts)})
    return {
        "reference_samples": {name: values[: len(samples)] for name, values in scored.items()},
        "reference_real": {name: values[len(samples) :] for name, values in scored.items()},
    }


def _measured(
    name: str, blocks: list[Block], actors: list[Any], folder: Location, given: Arrays | None
) -> Arrays:
    """One measurement; blocks that are there already are read, each other is saved when done."""
    found = {
        block: load_arrays(file) for block in blocks if (file := folder / block.file_name).is_file()
    }
    missing = [block for block in blocks if block not in found]
    done = sum(block.size for block in found)
    total = done + sum(block.size for block in missing)
    notes: dict[str, Any] = {"workers": len(actors)} | ({"resumed": done} if done else {})
    if missing:
        what, unit = _SHOWN[name]
        with Progress(what, total, unit) as progress:
            progress.update(done, **notes)
            for block, arrays in evaluated(actors, missing, given):
                save_arrays(arrays, folder / block.file_name)
                found[block] = arrays
                done += block.size
                progress.update(done, **notes)
    return joined([found[block] for block in blocks])


def _figures(
    settings: EvaluationSpec,
    split: Split,
    results: Mapping[str, Arrays],
    num_words: NDArray[np.int64],
) -> dict[str, Any]:
    """All figures, from the results of the measurements."""
    documents = results["documents"]
    figures = summarize(documents, settings.iw_samples, num_words)
    figures["split"] = split.name
    figures["projection"] = projection(documents["posterior_means"], documents["num_predicted"])
    if "curve" in results:
        figures["iw_curve"] = curve_figures(results["curve"], settings.iw_curve)
    if "probe" in results:
        figures["probe"] = probe_figures(results["probe"])
    if "mutual_information" in results:
        log_aggregate = results["mutual_information"]["log_aggregate"]
        found = mutual_information(documents, log_aggregate, split.is_conditional)
        figures["standard_errors"]["mutual_information"] = found.pop("mutual_information_error")
        figures |= found
    if "samples" in results:
        samples, texts = (results[name]["text"].tolist() for name in ("samples", "texts"))
        figures["generation"] = generation_figures(samples, texts, settings)
        names = [name for name in ("samples", "real") if f"reference_{name}" in results]
        scored = {name: results[f"reference_{name}"] for name in names}
        add_reference_perplexity(figures["generation"], scored)
    if "reconstructions" in results:
        figures["reconstruction"] = reconstruction_summary(results["reconstructions"], settings)
    if "responses" in results:
        figures["responses"] = response_summary(results["responses"], settings)
    return figures | shown_texts(results)


def _document_ids(split: Split, num_documents: int) -> list[str]:
    found: list[str] = []
    for index, group in enumerate(split.row_groups):
        if group.first_document < num_documents:
            found += split.read_document_ids(index)
    return found[:num_documents]


def save_documents(
    documents: Arrays, document_ids: list[str], num_words: NDArray[np.int64], output: Location
) -> None:
    """Write a row a document, in the split's order."""
    kl_per_layer = documents["kl_per_layer"]
    table = pa.table(
        {
            "document": np.arange(len(num_words)),
            "document_id": document_ids,
            "reconstruction_nll": documents["reconstruction_nll"],
            "kl": kl_per_layer.sum(axis=1),
            "kl_per_layer": pa.array(list(kl_per_layer), pa.list_(pa.float64())),
            "iw_nll": documents["iw_nll"],
            "num_predicted": documents["num_predicted"],
            "num_words": num_words,
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    (output / DOCUMENTS).write_bytes(buffer.getvalue())
