"""Blocks of documents, and the worker that evaluates them.

A block is a range of documents that depends on nothing but the split, so that an interrupted
evaluation goes on from its finished blocks with other workers or batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.documents import DocumentFigures, Moments
from pipeline.noise import Purpose, Stream, document_noise
from pipeline.specs.evaluate import EvaluationSpec
from pipeline.storage import Location

if TYPE_CHECKING:
    import torch

    from della_model import Della
    from pipeline.shards import Split

BLOCK_DOCUMENTS = 128  # what an interruption can cost, and the step of the progress bar


@dataclass(frozen=True)
class Block:
    """Documents `start` to `stop` (not included) of a split."""

    start: int
    stop: int

    @property
    def file_name(self) -> str:
        """Where its figures are kept until all blocks are done."""
        return f"documents-{self.start:09d}.npz"


def cut_blocks(num_documents: int) -> list[Block]:
    """Cut a split into blocks."""
    starts = range(0, num_documents, BLOCK_DOCUMENTS)
    return [Block(start, min(start + BLOCK_DOCUMENTS, num_documents)) for start in starts]


class BlockEvaluator:
    """Loads weights once, at the first need, and evaluates blocks.

    Args:
        weights: a `from_pretrained` folder.
        split: where the documents are read.
        settings: samples, seed and batch size.
        device: where the model computes.
        num_threads: CPUs of this worker; None leaves torch's setting as it is.
    """

    def __init__(
        self,
        weights: Location,
        split: Split,
        settings: EvaluationSpec,
        device: str = "cpu",
        num_threads: int | None = None,
    ) -> None:
        self._weights, self._split, self._settings = weights, split, settings
        self._device, self._num_threads = device, num_threads
        self._row_group: tuple[int, Any] = (-1, None)  # the last one read

    @cached_property
    def _model(self) -> Della:
        import torch

        from pipeline.weights import load_model

        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        return load_model(self._weights, self._device)

    def ready(self) -> None:
        """Load the weights.

        Raises:
            UserError: if they cannot be used.
        """
        assert self._model is not None

    def evaluate(self, block: Block, num_words: NDArray[np.int32]) -> DocumentFigures:
        """Figures of a block's documents, in their order; `num_words` of each go along."""
        documents = self.read(block)
        lengths = np.array([len(document) for document in documents], np.int32)
        places = np.arange(block.start, block.stop)
        figures: list[dict[str, NDArray[Any]]] = []
        order: list[NDArray[np.int64]] = []
        for chosen in _batches(lengths, self._settings.batch_tokens):
            figures.append(self._batch([documents[i] for i in chosen], places[chosen]))
            order.append(chosen)
        back = np.argsort(np.concatenate(order), kind="stable")
        arrays = {k: np.concatenate([f[k] for f in figures])[back] for k in figures[0]}
        means = arrays.pop("posterior_means")
        return DocumentFigures(
            **arrays,
            num_words=num_words.astype(np.int64),
            posterior_means=Moments.of(means),
        )

    def read(self, block: Block) -> list[NDArray[np.int32]]:
        """Token ids of a block's documents."""
        found: list[NDArray[np.int32]] = []
        for index, group in enumerate(self._split.row_groups):
            first = max(block.start - group.first_document, 0)
            last = min(block.stop - group.first_document, group.num_rows)
            if first < last:
                if self._row_group[0] != index:
                    self._row_group = (index, self._split.read_row_group(index))
                found += [self._row_group[1][i] for i in range(first, last)]
        return found

    def _batch(
        self, documents: Sequence[NDArray[np.int32]], places: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Figures of documents that are computed together."""
        import torch

        from della_model import iw_nll

        model, settings = self._model, self._settings
        input_ids, attention_mask = padded(documents, self._device)
        shape = (model.config.num_latent_layers, model.config.latent_size)
        stream = Stream(settings.seed, Purpose.LIKELIHOOD)
        draws = range(1 + settings.iw_samples)
        drawn = np.stack([document_noise(stream, places, shape, draw) for draw in draws])
        noise = torch.from_numpy(drawn).to(self._device)  # [1 + K, B, L, p]
        draws_at_once = max(1, settings.batch_tokens // input_ids.numel())
        with torch.inference_mode():
            elbo = model.elbo_terms(input_ids, attention_mask, noise[0])
            tightest = iw_nll(model, input_ids, attention_mask, noise[1:], draws_at_once)
            # Without noise the chain runs on posterior means.
            means = model.infer(input_ids, attention_mask, torch.zeros_like(noise[0])).latents
        return {
            "reconstruction_nll": elbo.reconstruction_nll.double().cpu().numpy(),
            "kl_per_layer": elbo.kl_per_layer.double().cpu().numpy(),
            "iw_nll": tightest.double().cpu().numpy(),
            "num_predicted": elbo.num_predicted.cpu().numpy().astype(np.int64),
            "posterior_means": means.double().cpu().numpy(),
        }

    def texts(self, num_documents: int) -> dict[str, Any]:
        """Sentences from the prior, and reconstructions of documents spread over the split."""
        from pipeline.evaluation.texts import sampled_and_reconstructed
        from pipeline.weights import load_weights_tokenizer

        settings = self._settings
        count = min(settings.num_reconstructions, num_documents)
        places = [i * num_documents // count for i in range(count)]
        sources = [self.read(Block(place, place + 1))[0] for place in places]
        tokenizer = load_weights_tokenizer(self._weights)
        return sampled_and_reconstructed(self._model, tokenizer, sources, settings)


def padded(
    documents: Sequence[NDArray[np.int32]], device: str | torch.device = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [B, T], int64, padded on the right; what pads is never looked at."""
    import torch

    longest = max(map(len, documents))
    input_ids = torch.zeros(len(documents), longest, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, document in enumerate(documents):
        input_ids[row, : len(document)] = torch.from_numpy(document.astype(np.int64))
        attention_mask[row, : len(document)] = 1
    return input_ids.to(device), attention_mask.to(device)


def _batches(lengths: NDArray[np.int32], batch_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Documents of like length together, as many as the budget holds with padding."""
    from pipeline.batches import cut_sorted

    order = np.argsort(lengths, kind="stable")
    # A document longer than the budget is a batch of its own: it still has to be evaluated.
    fits = int(np.searchsorted(lengths[order], batch_tokens, side="right"))
    if fits:
        yield from np.split(order[:fits], cut_sorted(lengths[order[:fits]], batch_tokens))
    for single in order[fits:]:
        yield np.array([single])
