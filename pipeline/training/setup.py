"""From a spec and a dataset to all that one worker needs for its loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from della_model import Della
from pipeline.batches import BatchOrder, MicroBatch, Position, accumulation_steps
from pipeline.shards import Dataset, Split
from pipeline.specs import TrainSpec
from pipeline.storage import Location
from pipeline.training.engine import prepare_process, start_engine
from pipeline.training.loader import Padding, Share, TrainLoader, validation_batches
from pipeline.training.model import (
    Vocabulary,
    beta_schedule,
    build_model,
    count_steps,
    learning_rate_schedule,
)


@dataclass(frozen=True)
class Run:
    """One worker's view of a run."""

    spec: TrainSpec
    engine: Any  # DeepSpeed's, around the objective
    device: torch.device
    share: Share
    padding: Padding
    split: Split
    order: BatchOrder
    total_steps: int
    validation: list[MicroBatch]  # [] without a validation split
    beta: Callable[[int], float]
    learning_rate: Callable[[int], float]
    tokenizer_folder: Location
    num_parameters: int
    num_latent_parameters: int

    @property
    def num_layers(self) -> int:
        """L, the latents of a document."""
        return self.padding.num_layers

    def loader(self, start: Position) -> TrainLoader:
        """This worker's share of the training batches from a position on."""
        return TrainLoader(self.split, self.order, start, self.share, self.padding)


def batch_order(spec: TrainSpec, split: Split) -> BatchOrder:
    """The order of the training batches."""
    return BatchOrder(
        lengths=split.lengths(),
        row_group_rows=tuple(group.num_rows for group in split.row_groups),
        batch_tokens=spec.train.batch_tokens,
        shuffle_window_tokens=spec.train.shuffle_window_tokens,
        seed=spec.train.seed,
        source_lengths=split.condition_lengths() if split.is_conditional else None,
    )


def start_run(
    spec: TrainSpec, dataset_folder: Location, rank: int, num_workers: int, use_gpu: bool
) -> Run:
    """Open the data, build the model and shard it. A collective call."""
    device = prepare_process(spec.train.cpus_per_worker, use_gpu)
    dataset = Dataset.open(dataset_folder)
    split = dataset.split("train")
    order = batch_order(spec, split)
    vocabulary = Vocabulary.of(dataset)
    model = build_model(spec, vocabulary)
    train = spec.train
    accumulation = accumulation_steps(train.batch_tokens, train.micro_batch_tokens, num_workers)
    share = Share(rank, num_workers, accumulation)
    padding = Padding(
        vocabulary.pad_id, model.config.num_latent_layers, model.config.latent_size, train.seed
    )
    validation: list[MicroBatch] = []
    if "valid" in dataset.split_names:
        validation = validation_batches(
            dataset.split("valid"), train.eval_documents, train.micro_batch_tokens, share, padding
        )
    total_steps = count_steps(spec, order)
    parameters, latent = count_parameters(model)
    return Run(
        spec=spec,
        engine=start_engine(spec, model, num_workers, accumulation),
        device=device,
        share=share,
        padding=padding,
        split=split,
        order=order,
        total_steps=total_steps,
        validation=validation,
        beta=beta_schedule(spec, total_steps),
        learning_rate=learning_rate_schedule(spec, total_steps),
        tokenizer_folder=dataset.tokenizer_folder,
        num_parameters=parameters,
        num_latent_parameters=latent,
    )


def count_parameters(model: Della) -> tuple[int, int]:
    """All parameters, and those that exist for the latents: pooling, chain and fusions."""
    latent = sum(p.numel() for module in model.latent_modules() for p in module.parameters())
    return sum(p.numel() for p in model.parameters()), latent
