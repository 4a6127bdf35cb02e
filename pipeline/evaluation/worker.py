"""What one worker of an evaluation does: any block of any measurement."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.evaluation.blocks import Arrays, Block, cut_blocks, joined, spread_places
from pipeline.evaluation.reading import Document, DocumentReader, make_batches
from pipeline.specs.evaluate import EvaluationSpec
from pipeline.storage import Location

if TYPE_CHECKING:
    from della_model import Della, DellaConfig
    from pipeline.evaluation.metrics.extras import ReferenceModel
    from pipeline.shards import Split

# Items of one block: what an interruption can cost, and the step of the progress bar.
_BLOCK_SIZES = {
    "documents": 64,
    "curve": 8,
    "probe": 16,
    "samples": 64,
    "reconstructions": 64,
    "interpolations": 1,
    "responses": 16,
    "mutual_information": 256,
}
REFERENCE_TEXTS = 32  # of one block for the reference model


def plan_blocks(
    settings: EvaluationSpec, config: DellaConfig, num_documents: int
) -> dict[str, list[Block]]:
    """The blocks of each measurement that is asked for and that this model has.

    A model without latents has one bound, nothing to probe, and nothing to reconstruct from.
    """
    counts = {
        "documents": num_documents,
        "samples": settings.num_samples,
    }
    if config.num_latent_layers:
        counts |= {
            "curve": min(settings.iw_curve_documents, num_documents),
            "probe": min(settings.probe_documents, num_documents) if num_documents > 1 else 0,
            "reconstructions": min(settings.num_reconstructions, num_documents),
            # Two documents of different sources have no text between them.
            "interpolations": 0
            if config.conditional
            else min(settings.num_interpolations, num_documents // 2),
            "mutual_information": num_documents if settings.mutual_information else 0,
        }
    if config.conditional and settings.responses_per_source:
        counts["responses"] = min(settings.num_sources, num_documents)
    return {
        name: cut_blocks(name, count, _BLOCK_SIZES[name]) for name, count in counts.items() if count
    }


class Evaluator:
    """Loads weights once, at the first need, and does blocks.

    Args:
        weights: a `from_pretrained` folder.
        split: where the documents are read.
        num_documents: the split's first, that are evaluated.
        settings: samples, seed and batch size.
        device: where the model computes.
        num_threads: CPUs of this worker; None leaves torch's setting as it is.
    """

    def __init__(
        self,
        weights: Location,
        split: Split,
        num_documents: int,
        settings: EvaluationSpec,
        device: str = "cpu",
        num_threads: int | None = None,
    ) -> None:
        self._weights, self._settings = weights, settings
        self._num_documents = num_documents
        self._device, self._num_threads = device, num_threads
        self._reader = DocumentReader(split)

    @cached_property
    def _model(self) -> Della:
        import torch

        from pipeline.weights import load_model

        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        return load_model(self._weights, self._device)

    @cached_property
    def _tokenizer(self) -> Any:
        from pipeline.weights import load_weights_tokenizer

        return load_weights_tokenizer(self._weights)

    def ready(self) -> None:
        """Load the weights.

        Raises:
            UserError: if they cannot be used.
        """
        assert self._model is not None

    def run(self, block: Block, *given: Any) -> Arrays:
        """The result of a block: arrays with a row an item, in the items' order.

        Args:
            block: which items of which measurement.
            given: results of earlier measurements that this one needs.
        """
        arrays: Arrays = getattr(self, f"_{block.measurement}")(block, *given)
        return arrays

    def _documents(self, block: Block) -> Arrays:
        from pipeline.evaluation.likelihood import document_figures

        return self._by_batch(range(block.start, block.stop), document_figures)

    def _curve(self, block: Block) -> Arrays:
        from pipeline.evaluation.likelihood import curve_figures

        chosen = spread_places(self._settings.iw_curve_documents, self._num_documents)
        return self._by_batch(chosen[block.start : block.stop], curve_figures)

    def _by_batch(self, places: Sequence[int], figures_of: Any) -> Arrays:
        """`figures_of(model, batch, settings)` of documents, back in their order."""
        batches = list(
            make_batches(self._reader.read(places), self._settings.batch_tokens, self._device)
        )
        arrays = joined([figures_of(self._model, batch, self._settings) for batch in batches])
        back = np.argsort(np.concatenate([batch.rows for batch in batches]), kind="stable")
        return {name: values[back] for name, values in arrays.items()}

    def _probe(self, block: Block) -> Arrays:
        from pipeline.evaluation.latents import probe_figures

        chosen = spread_places(self._settings.probe_documents, self._num_documents)
        if len(chosen) == 1:  # one is asked for, but a partner is there
            chosen = spread_places(2, self._num_documents)
        partners = [*chosen[1:], chosen[0]]
        read = self._reader.read
        return probe_figures(
            self._model,
            read(chosen[block.start : block.stop]),
            read(partners[block.start : block.stop]),
        )

    def _mutual_information(self, block: Block, documents: Arrays) -> Arrays:
        from pipeline.evaluation.latents import aggregate_figures

        mine = slice(block.start, block.stop)
        return aggregate_figures(
            documents["feature_terms"],
            documents["latent_terms"][mine],
            documents["latents"][mine],
            self._device,
        )

    @cached_property
    def _reference_model(self) -> ReferenceModel:
        from pipeline.evaluation.metrics.extras import ReferenceModel

        assert self._settings.reference_model is not None
        return ReferenceModel(Location.parse(self._settings.reference_model), self._device)

    def _reference(self, block: Block, given: Arrays) -> Arrays:
        texts = given["text"][block.start : block.stop].tolist()
        return self._reference_model.figures(texts)

    def _samples(self, block: Block) -> Arrays:
        from pipeline.evaluation.texts import sampled, sampled_for_sources

        if not self._model.config.conditional:
            return sampled(self._model, self._tokenizer, block.start, block.size, self._settings)
        # Over and over, where more texts are asked for than there are sources.
        places = [number % self._num_documents for number in range(block.start, block.stop)]
        documents = self._reader.read(places)
        return sampled_for_sources(
            self._model, self._tokenizer, documents, block.start, self._settings
        )

    def _responses(self, block: Block) -> Arrays:
        from pipeline.evaluation.texts import responses

        chosen = spread_places(self._settings.num_sources, self._num_documents)
        documents = self._reader.read(chosen[block.start : block.stop])
        return responses(self._model, self._tokenizer, documents, block.start, self._settings)

    def _reconstructions(self, block: Block) -> Arrays:
        from pipeline.evaluation.texts import reconstructed

        chosen = spread_places(self._settings.num_reconstructions, self._num_documents)
        documents = self._reader.read(chosen[block.start : block.stop])
        return reconstructed(self._model, self._tokenizer, documents, self._settings)

    def _interpolations(self, block: Block) -> Arrays:
        from pipeline.evaluation.texts import interpolated

        chosen = spread_places(2 * self._settings.num_interpolations, self._num_documents)
        documents: list[Document] = self._reader.read(chosen[2 * block.start : 2 * block.stop])
        pairs = list(zip(documents[::2], documents[1::2], strict=True))
        return interpolated(self._model, self._tokenizer, pairs)
