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
from pipeline.training.deepspeed_config import deepspeed_config, merged
from pipeline.training.engine import shape_of, start_engine
from pipeline.training.loader import Padding, Share, TrainLoader, validation_batches
from pipeline.training.model import (
    Vocabulary,
    beta_schedule,
    build_model,
    check_attention,
    count_steps,
    learning_rate_schedule,
)
from pipeline.training.process import prepare_process, return_freed_memory
from pipeline.training.trainable import set_trainable


@dataclass(frozen=True)
class ParameterCounts:
    """How many numbers a model has."""

    total: int
    latent: int  # of the parts that exist for the latents
    trained: int


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
    parameters: ParameterCounts

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
    spec: TrainSpec,
    dataset_folder: Location,
    rank: int,
    num_workers: int,
    use_gpu: bool,
    load_universal: bool = False,
) -> Run:
    """Open the data, build the model and shard it. A collective call.

    Args:
        spec: the run.
        dataset_folder: the dataset.
        rank: this worker's.
        num_workers: how many workers there are.
        use_gpu: whether this worker has a GPU.
        load_universal: make an engine that loads a converted checkpoint, and no other.
    """
    device = prepare_process(spec.train.cpus_per_worker, use_gpu)
    if spec.deepspeed.zero_stage == 3 and not use_gpu:
        return_freed_memory()
    check_attention(spec.model.attention)
    dataset = Dataset.open(dataset_folder)
    split = dataset.split("train")
    order = batch_order(spec, split)
    vocabulary = Vocabulary.of(dataset)
    train = spec.train
    accumulation = accumulation_steps(train.batch_tokens, train.micro_batch_tokens, num_workers)
    config = deepspeed_config(spec, num_workers, accumulation)
    if load_universal:
        config = merged(config, {"checkpoint": {"load_universal": True}})
    model = build_model(spec, vocabulary, split.is_conditional, config)
    share = Share(rank, num_workers, accumulation)
    padding = Padding(
        vocabulary.pad_id,
        model.config.num_latent_layers,
        model.config.latent_size,
        train.seed,
        train.word_dropout,
    )
    validation: list[MicroBatch] = []
    if "valid" in dataset.split_names:
        validation = validation_batches(
            dataset.split("valid"), train.eval_documents, train.micro_batch_tokens, share, padding
        )
    total_steps = count_steps(spec, order)
    set_trainable(model, train)
    parameters = count_parameters(model)
    return Run(
        spec=spec,
        engine=start_engine(spec, model, config),
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
        parameters=parameters,
    )


def count_parameters(model: Della) -> ParameterCounts:
    """Count a model's parameters; tied ones once."""
    latent = {id(p) for _, part in model.latent_parts() for p in part.parameters()}
    sizes = [(id(p), shape_of(p).numel(), p.requires_grad) for p in model.parameters()]
    return ParameterCounts(
        total=sum(size for _, size, _ in sizes),
        latent=sum(size for key, size, _ in sizes if key in latent),
        trained=sum(size for *_, size, is_trained in sizes if is_trained),
    )
