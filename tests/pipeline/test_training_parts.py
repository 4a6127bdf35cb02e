"""The parts of training that need no Ray: loader, config, metrics, export's folder swap."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import fs

from pipeline.batches import MicroBatch, Position
from pipeline.errors import UserError
from pipeline.shards import Dataset, Documents, Split
from pipeline.storage import Location
from pipeline.training.deepspeed_config import deepspeed_config
from pipeline.training.export import replace_folder
from pipeline.training.loader import (
    Padding,
    Share,
    TrainLoader,
    dropped_words,
    validation_batches,
)
from pipeline.training.meter import Meter
from pipeline.training.metrics import MetricsLog, read_rows
from pipeline.training.model import count_steps, learning_rate_schedule
from pipeline.training.setup import batch_order
from tests.pipeline.train_data import small_dataset, train_spec

PADDING = Padding(pad_id=0, num_layers=3, latent_size=5, seed=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_dataset(tmp_path_factory.mktemp("data"))


def documents_in(batch: MicroBatch) -> list[tuple[int, ...]]:
    """The real documents of a micro-batch, as token ids with their noise's first number."""
    kept = [i for i, weight in enumerate(batch.document_weight.tolist()) if weight > 0]
    return [
        (*batch.input_ids[i][batch.attention_mask[i].bool()].tolist(), batch.noise[i, 0, 0].item())
        for i in kept
    ]


def steps_of(split: Split, workers: int, accumulation: int, start: Position, count: int) -> list:
    """Each step's documents over all workers."""
    order = batch_order(train_spec(train__shuffle_window_tokens=700), split)
    loaders = [
        TrainLoader(split, order, start, Share(rank, workers, accumulation), PADDING)
        for rank in range(workers)
    ]
    steps = []
    for _ in range(count):
        batches = [loader.next() for loader in loaders]
        assert {len(b.micro_batches) for b in batches} == {accumulation}
        found = [d for b in batches for micro in b.micro_batches for d in documents_in(micro)]
        weights = [w for b in batches for m in b.micro_batches for w in m.document_weight.tolist()]
        assert sum(weights) == pytest.approx(workers * accumulation)
        assert len(found) == batches[0].num_documents
        steps.append((batches[0].position, sorted(found)))
    for loader in loaders:
        loader.close()
    return steps


@pytest.mark.parametrize(("workers", "accumulation"), [(2, 1), (3, 1), (1, 4), (3, 2)])
def test_loader_any_workers_gives_the_same_steps(
    dataset: Dataset, workers: int, accumulation: int
) -> None:
    split = dataset.split("train")
    alone = steps_of(split, 1, 1, Position(), 30)
    assert steps_of(split, workers, accumulation, Position(), 30) == alone


def test_loader_resumed_on_more_workers_goes_on_exactly(dataset: Dataset) -> None:
    split = dataset.split("train")
    straight = steps_of(split, 1, 1, Position(), 30)
    for at in (3, 11, 20):
        assert steps_of(split, 2, 1, straight[at][0], 5) == straight[at : at + 5]


def test_loader_reads_no_row_group_before_its_window(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = dataset.split("train")
    read: list[int] = []
    original = Split.read_row_group

    def counted(self: Split, index: int) -> Documents:
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(Split, "read_row_group", counted)
    order = batch_order(train_spec(train__shuffle_window_tokens=700), split)
    windows = list(order.windows(0))
    loader = TrainLoader(split, order, Position(), Share(0, 1, 1), PADDING)
    loader.next()
    loader.close()
    ahead = {g for window in windows[:4] for g in window.row_groups}
    assert len(windows) >= 6
    assert set(read) < set(range(len(split.row_groups)))
    assert set(read) <= ahead


def test_loader_damaged_shard_raises_where_the_step_is_asked_for(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path)
    split = dataset.split("train")
    order = batch_order(train_spec(), split)
    next((tmp_path / "train").glob("part-00000*")).write_bytes(b"PAR1 no more")
    loader = TrainLoader(split, order, Position(), Share(0, 1, 1), PADDING)
    with pytest.raises(UserError, match="part-00000"):
        loader.next()
    loader.close()
    assert not [t for t in threading.enumerate() if t.name == "train-loader"]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_validation_batches_any_workers_are_the_first_documents(
    dataset: Dataset, workers: int
) -> None:
    split = dataset.split("valid")
    shares = [
        validation_batches(split, 29, 200, Share(rank, workers, 1), PADDING)
        for rank in range(workers)
    ]
    assert len({len(share) for share in shares}) == 1
    found = sorted(d for share in shares for batch in share for d in documents_in(batch))
    alone = validation_batches(split, 29, 10**6, Share(0, 1, 1), PADDING)
    assert found == sorted(documents_in(alone[0]))
    assert len(found) == 29


def test_deepspeed_config_resolves_every_batch_number() -> None:
    spec = train_spec(deepspeed__zero_stage=1, train__max_grad_norm=0.7, train__precision="bf16")
    config = deepspeed_config(spec, num_workers=3, accumulation=4)
    assert config["train_batch_size"] == 12
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.7
    assert config["zero_optimization"] == {"stage": 1}
    assert config["bf16"] == {"enabled": True}
    assert "auto" not in str(config)


def test_deepspeed_config_extra_is_merged_below_sections() -> None:
    spec = train_spec(deepspeed__extra={"zero_optimization": {"overlap_comm": False}})
    zero = deepspeed_config(spec, 1, 1)["zero_optimization"]
    assert zero == {"stage": 2, "overlap_comm": False}


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"zero_optimisation": {}}, r"zero_optimisation is no section.*'zero_optimization'"),
        ({"gradient_clipping": 1.0}, r"gradient_clipping is decided by train.max_grad_norm"),
        ({"zero_optimization": {"stage": 3}}, r"stage=3 contradicts deepspeed.zero_stage=2"),
        ({"zero_optimization": 3}, r"expected a table"),
    ],
)
def test_deepspeed_config_bad_extra_is_refused(extra: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        deepspeed_config(train_spec(deepspeed__extra=extra), 1, 1)


def test_count_steps_ends_at_whichever_comes_first(dataset: Dataset) -> None:
    order = batch_order(train_spec(), dataset.split("train"))
    epochs = [order.num_batches(0), order.num_batches(1)]
    assert count_steps(train_spec(train__max_steps=None, train__max_epochs=2), order) == sum(epochs)
    assert count_steps(train_spec(train__max_steps=3, train__max_epochs=2), order) == 3
    assert count_steps(train_spec(train__max_steps=999, train__max_epochs=1), order) == epochs[0]
    assert count_steps(train_spec(train__max_steps=999), order) == 999


def test_learning_rate_warm_up_longer_than_the_run_does_not_fail() -> None:
    schedule = learning_rate_schedule(train_spec(train__warmup_steps=100), total_steps=5)
    assert schedule(4) == pytest.approx(1e-3 * 5 / 100)


@pytest.mark.parametrize("remote", [False, True])
def test_metrics_resumed_drops_the_rows_of_later_steps(tmp_path: Path, remote: bool) -> None:
    output = Location(fs.LocalFileSystem(), str(tmp_path), "object-storage" if remote else "")
    log = MetricsLog(output, 0)
    for step in range(1, 6):
        log.write({"kind": "train", "step": step, "epoch": 0, "loss": float(step)})
    log.close()
    if not remote:
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "train", "st')  # what a kill leaves
    log = MetricsLog(output, 3)
    log.write({"kind": "train", "step": 4, "epoch": 0, "loss": 40.0, "kl_per_layer": [1.0]})
    log.close()
    rows = read_rows(output)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert losses_in_tensorboard(tmp_path / "tensorboard") == [1, 2, 3, 40]


def losses_in_tensorboard(folder: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


@pytest.mark.parametrize("scheme", ["", "object-storage"])
def test_replace_folder_leaves_only_the_new_files(tmp_path: Path, scheme: str) -> None:
    target = Location(fs.LocalFileSystem(), str(tmp_path / "weights" / "best"), scheme)
    for version in ("old", "new"):
        source = tmp_path / version
        source.mkdir()
        (source / "config.json").write_text(version)
        replace_folder(source, target)
    assert (target / "config.json").read_bytes() == b"new"
    assert [child.name for child in target.parent.children()] == ["best"]


def test_seed_below_zero_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.seed=-1"):
        train_spec(train__seed=-1)


def test_word_dropout_is_a_function_of_seed_epoch_and_document_alone(dataset: Dataset) -> None:
    padding = replace(PADDING, word_dropout=0.4)
    documents = np.array([7, 3, 11])
    together = dropped_words(padding, 2, documents, 50)
    for row, document in enumerate(documents):
        alone = dropped_words(padding, 2, np.array([document]), 31)
        assert torch.equal(alone[0], together[row, :31])
    assert not torch.equal(dropped_words(padding, 3, documents, 50), together)
    many = dropped_words(padding, 0, np.arange(200), 50)
    assert not many[:, 0].any()
    assert many[:, 1:].float().mean().item() == pytest.approx(0.4, abs=0.02)


def test_word_dropout_hides_the_decoders_inputs_in_training_alone(dataset: Dataset) -> None:
    split = dataset.split("train")
    padding = replace(PADDING, word_dropout=0.4)
    order = batch_order(train_spec(), split)
    loader = TrainLoader(split, order, Position(), Share(0, 1, 1), padding)
    batch = loader.next().micro_batches[0]
    loader.close()
    assert batch.decoder_input_ids is not None
    changed = batch.decoder_input_ids != batch.input_ids
    assert changed.any()
    assert (batch.decoder_input_ids[changed] == padding.pad_id).all()
    plain = validation_batches(dataset.split("valid"), 40, 512, Share(0, 1, 1), padding)
    assert all(batch.decoder_input_ids is None for batch in plain)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """One process that is a whole group."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_meter_has_a_column_for_the_bag_of_words_where_the_loss_has_one() -> None:
    sums = {
        "loss": 8.0,
        "reconstruction_nll": 12.0,
        "kl": 6.0,
        "num_documents": 3,
        "num_tokens": 11,
    }
    found = {name: torch.tensor(float(value)) for name, value in sums.items()}
    found["kl_per_layer"] = torch.tensor([2.0, 4.0])
    meter = Meter(2, torch.device("cpu"))
    meter.add(found)
    row = meter.reduced()
    assert "bag_of_words_nll" not in row
    assert (row["kl_per_layer"], row["num_tokens"]) == ([2 / 3, 4 / 3], 11)
    for value in (21.0, 9.0):
        meter.add(found | {"bag_of_words_nll": torch.tensor(value)})
    assert meter.reduced()["bag_of_words_nll"] == 30 / 6
