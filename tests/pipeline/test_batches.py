"""The order of batches, its division among workers, and the noise."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from pipeline.batches import (
    BatchOrder,
    Position,
    accumulation_steps,
    cut_evenly,
    cut_sorted,
    dropout_seed,
    padded,
    split,
)
from pipeline.errors import UserError


def make_order(
    seed: int, documents: int = 301, batch_tokens: int = 97, window: int = 900, longest: int = 40
) -> BatchOrder:
    random = np.random.default_rng(seed)
    lengths = random.integers(2, longest, documents).astype(np.int32)
    rows = [23] * (documents // 23) + [documents % 23]
    return BatchOrder(lengths, rows, batch_tokens, window, seed)


def epoch_of(order: BatchOrder, epoch: int) -> list[list[int]]:
    return [batch.tolist() for window in order.windows(epoch) for batch in window.batches]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("window", [200, 900, 10**9])
def test_epoch_any_seed_holds_every_document_once(seed: int, window: int) -> None:
    order = make_order(seed, window=window)
    for epoch in (0, 1):
        documents = sorted(d for batch in epoch_of(order, epoch) for d in batch)
        assert documents == list(range(301))


@pytest.mark.parametrize("seed", range(8))
def test_batches_any_seed_hold_the_token_budget_and_are_sorted(seed: int) -> None:
    order = make_order(seed)
    for batch in epoch_of(order, 0):
        lengths = order.lengths[batch]
        assert len(batch) * lengths.max() <= 97
        assert (np.diff(lengths) >= 0).all()


def test_windows_hold_their_token_budget() -> None:
    order = make_order(3, window=900)
    starts, rows = order.first_documents, order.row_group_rows
    windows = list(order.windows(0))
    assert len(windows) > 3
    for window in windows:
        tokens = sum(
            int(order.lengths[starts[g] : starts[g] + rows[g]].sum()) for g in window.row_groups
        )
        assert tokens <= 900
        for batch in window.batches:
            groups = np.searchsorted(starts, batch, side="right") - 1
            assert set(groups.tolist()) <= set(window.row_groups)


def test_epochs_and_seeds_differ_in_order() -> None:
    order = make_order(5, window=10**9)
    again = BatchOrder(order.lengths, order.row_group_rows, 97, 10**9, 6)
    assert epoch_of(order, 0) == epoch_of(order, 0)
    assert epoch_of(order, 0) != epoch_of(order, 1)
    assert epoch_of(order, 0) != epoch_of(again, 0)


@pytest.mark.parametrize("seed", range(3))
def test_resume_at_any_position_follows_the_straight_order(seed: int) -> None:
    order = make_order(seed, documents=151)
    length = order.num_batches(0)
    straight = [
        (position, batch.tolist())
        for position, batch in islice(order.batches_from(Position()), 2 * length)
    ]
    for skip in range(length + 3):
        # A run may have stopped at an epoch's last batch: its next one is (0, length).
        start = straight[skip][0] if skip != length else Position(0, length)
        resumed = [(p, b.tolist()) for p, b in islice(order.batches_from(start), 5)]
        assert resumed == straight[skip : skip + 5]


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_split_any_workers_is_the_global_batch_in_balance(
    num_workers: int, accumulation: int
) -> None:
    order = make_order(11)
    for batch in islice((b for _, b in order.batches_from(Position())), 20):
        parts = [p for rank in split(batch, num_workers, accumulation) for p in rank]
        assert sorted(np.concatenate(parts)) == sorted(batch)
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_cut_sorted_takes_as_much_as_fits() -> None:
    lengths = np.array([2, 3, 3, 5, 7, 7, 11], np.int32)
    assert cut_sorted(lengths, 14) == [3, 5, 6]  # 3x3, 2x7, 1x7, 1x11
    assert cut_sorted(lengths, 10**6) == []


def test_cut_evenly_leaves_no_crumb() -> None:
    lengths = np.full(21, 5, np.int32)
    assert cut_sorted(lengths, 100) == [20]  # 20 documents, then 1
    assert cut_evenly(lengths, 100) == [11]


def test_document_longer_than_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"longest document has 120 tokens.*train.batch_tokens=97"):
        BatchOrder(np.array([3, 120], np.int32), [2], 97, 900, 0)


def test_accumulation_rounds_up() -> None:
    assert accumulation_steps(8192, 2048, 1) == 4
    assert accumulation_steps(8192, 2048, 3) == 2
    assert accumulation_steps(100, 2048, 3) == 1


def test_dropout_seed_differs_by_every_argument() -> None:
    seeds = {dropout_seed(*key) for key in np.ndindex(3, 3, 9)}
    assert len(seeds) == 81
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_padded_masks_what_is_no_token() -> None:
    tokens = [np.array([1, 5, 2], np.int32), np.array([1, 2], np.int32)]
    batch = padded(tokens, np.zeros((2, 3, 5), np.float32), 0.5, pad_id=0)
    assert batch.input_ids.tolist() == [[1, 5, 2], [1, 2, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.document_weight.tolist() == [0.5, 0.5]
