"""The evaluate stage: figures of trained weights on a split, spread over Ray actors."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console

from pipeline.cluster import connected, require_shared_storage
from pipeline.errors import UserError
from pipeline.evaluation.blocks import Block, cut_blocks
from pipeline.evaluation.documents import DocumentFigures
from pipeline.evaluation.figures import summarize
from pipeline.evaluation.spread import evaluated, fetched, plan_workers, started
from pipeline.evaluation.table import print_evaluation
from pipeline.progress import Progress
from pipeline.shards import Dataset, Split
from pipeline.specs import EvaluateSpec
from pipeline.storage import Location
from pipeline.weights import check_tokenizer, load_config, resolve_weights

DOCUMENTS = "documents.parquet"
BLOCKS = "blocks"


def run_evaluate(
    spec: EvaluateSpec, inputs: dict[str, Location], output: Location
) -> dict[str, Any]:
    """Evaluate `inputs["weights"]` on a split of `inputs["dataset"]`.

    Writes `documents.parquet`, a row a document. Finished blocks lie in `blocks/` until all are
    done, so an interrupted evaluation goes on from them.

    Returns:
        The figures of `pipeline.evaluation.figures.summarize`, with `split`, `samples` and
        `reconstructions`. Nats a document, with standard errors over documents.

    Raises:
        UserError: if weights, dataset and split do not fit each other, or the cluster has not what
            was asked for.
    """
    weights = resolve_weights(inputs["weights"])
    dataset = Dataset.open(inputs["dataset"])
    check_tokenizer(weights, dataset)
    split = dataset.split(spec.split)
    num_documents = min(split.num_documents, spec.evaluate.max_documents or split.num_documents)
    _check_lengths(weights, split, num_documents)

    with connected(spec.cluster):
        require_shared_storage(output)
        documents, texts = _evaluate(spec, weights, split, num_documents, output)
    documents.save_parquet(output / DOCUMENTS)
    figures = summarize(documents, spec.evaluate.iw_samples) | {"split": spec.split} | texts
    (output / BLOCKS).delete()
    print_evaluation(figures, Console())
    return figures


def _check_lengths(weights: Location, split: Split, num_documents: int) -> None:
    context = load_config(weights).backbone.max_position_embeddings
    lengths = split.lengths()[:num_documents]
    too_long = np.flatnonzero(lengths > context)
    if len(too_long):
        worst = int(lengths.argmax())
        raise UserError(
            f"{len(too_long)} documents of the split '{split.name}' are longer than the model's "
            f"context of {context} tokens (document {worst} has {lengths[worst]}): they cannot be "
            f"evaluated whole; preprocess with corpus.max_tokens={context}, or train with a larger "
            "model.context."
        )


def _evaluate(
    spec: EvaluateSpec, weights: Location, split: Split, num_documents: int, output: Location
) -> tuple[DocumentFigures, dict[str, Any]]:
    """Figures of all documents in their order, and the texts to show."""
    blocks = cut_blocks(num_documents)
    found = {
        block: DocumentFigures.load(file)
        for block in blocks
        if (file := output / BLOCKS / block.file_name).is_file()
    }
    missing = [block for block in blocks if block not in found]
    workers = plan_workers(spec.evaluate, len(missing))
    with started(workers, weights, split, spec.evaluate) as actors:
        if missing:
            _fill(found, actors, missing, split, output)
        texts: dict[str, Any] = fetched(actors[0].texts.remote(num_documents))
    return DocumentFigures.join([found[block] for block in blocks]), texts


def _fill(
    found: dict[Block, DocumentFigures],
    actors: list[Any],
    missing: list[Block],
    split: Split,
    output: Location,
) -> None:
    """Evaluate the missing blocks; each is saved when it is done."""
    done = sum(figures.num_documents for figures in found.values())
    total = done + sum(block.stop - block.start for block in missing)
    resumed = {"resumed": done} if done else {}
    num_words = split.num_words_per_document()
    with Progress("evaluate", total, "documents") as progress:
        progress.update(done, workers=len(actors), **resumed)
        for block, figures in evaluated(actors, missing, num_words):
            figures.save(output / BLOCKS / block.file_name)
            found[block] = figures
            done += figures.num_documents
            progress.update(done, workers=len(actors), **resumed)
