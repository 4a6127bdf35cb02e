"""Whatever the points of interruption and the numbers of workers: the batches are the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pipeline.batches import MicroBatch, Position, accumulation_steps
from pipeline.shards import Dataset
from pipeline.training.loader import Padding, Share, TrainLoader
from pipeline.training.setup import batch_order
from tests.pipeline.train_data import small_dataset, train_spec

STEPS = 30
SPEC = train_spec(train__batch_tokens=700, train__micro_batch_tokens=150, train__word_dropout=0.2)
Batch = list[tuple[bytes, ...]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_dataset(tmp_path_factory.mktemp("data"), train=120, valid=0)


def rows_of(micro: MicroBatch) -> Batch:
    """Each document's tokens, noise and hidden words, without padding and fillers."""
    assert micro.decoder_input_ids is not None
    return [
        (
            micro.input_ids[i][micro.attention_mask[i].bool()].numpy().tobytes(),
            micro.decoder_input_ids[i][micro.attention_mask[i].bool()].numpy().tobytes(),
            micro.noise[i].numpy().tobytes(),
        )
        for i in range(len(micro.input_ids))
        if micro.document_weight[i] > 0
    ]


def trained(
    dataset: Dataset, start: Position, num_workers: int, num_steps: int
) -> list[tuple[Position, Batch]]:
    """What all workers together see in each step, and the position after it."""
    split = dataset.split("train")
    order, padding = batch_order(SPEC, split), Padding(0, 2, 3, seed=5, word_dropout=0.2)
    accumulation = accumulation_steps(700, 150, num_workers)
    loaders = [
        TrainLoader(split, order, start, Share(rank, num_workers, accumulation), padding)
        for rank in range(num_workers)
    ]
    try:
        found = []
        for _ in range(num_steps):
            steps = [loader.next() for loader in loaders]
            assert len({step.next_position for step in steps}) == 1
            rows = [row for step in steps for micro in step.micro_batches for row in rows_of(micro)]
            found.append((steps[0].next_position, sorted(rows)))
        return found
    finally:
        for loader in loaders:
            loader.close()


@pytest.fixture(scope="module")
def straight(dataset: Dataset) -> list[Batch]:
    return [batch for _, batch in trained(dataset, Position(), 1, STEPS)]


@pytest.mark.parametrize("seed", range(12))
def test_batches_after_any_interruptions_equal_the_straight_runs(
    dataset: Dataset, straight: list[Batch], seed: int
) -> None:
    draw = random.Random(seed)
    checkpoint_every = draw.randint(1, 7)
    saved, seen = (0, Position()), {}
    while saved[0] < STEPS:
        step = saved[0]
        killed_after = draw.randint(1, STEPS - step)
        for position, batch in trained(dataset, saved[1], draw.randint(1, 4), killed_after):
            seen[step] = batch  # a step made again replaces what was lost
            step += 1
            if step % checkpoint_every == 0 or step == STEPS or draw.random() < 0.1:
                saved = (step, position)
    assert [seen[step] for step in range(STEPS)] == straight


def test_straight_run_sees_each_document_once_an_epoch(dataset: Dataset, tmp_path: Path) -> None:
    seen: list[bytes] = []
    for position, batch in trained(dataset, Position(), 3, STEPS):
        seen += [row[0] for row in batch]
        if position.epoch > 0 or position.batch == batch_order(
            SPEC, dataset.split("train")
        ).num_batches(0):
            break
    assert len(seen) == 120
