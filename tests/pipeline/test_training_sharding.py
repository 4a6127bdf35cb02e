"""DeepSpeed's engine on real gloo workers against one plain process."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.batches import Position
from pipeline.shards import Dataset
from pipeline.specs import TrainSpec
from pipeline.storage import Location
from pipeline.training.loader import Padding, Share, TrainLoader
from pipeline.training.model import (
    Vocabulary,
    beta_schedule,
    build_model,
    build_objective,
    learning_rate_schedule,
)
from pipeline.training.setup import batch_order
from pipeline.training.trainable import set_trainable
from tests.pipeline.gloo_processes import start_processes
from tests.pipeline.train_data import small_dataset, train_spec

pytestmark = pytest.mark.slow
STEPS = 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_dataset(tmp_path_factory.mktemp("data"))


def spec_of(**values: Any) -> TrainSpec:
    """No dropout, and a KL that counts from the first step on."""
    return train_spec(
        model__dropout=0.0,
        train__max_grad_norm=0.5,
        train__beta={"kind": "constant", "delay": 0.0, "value": 0.7},
        **({"train__free_bits": 0.02} | values),
    )


def sharded_training(
    rank: int, num_workers: int, spec: TrainSpec, folder: Location, result: Path
) -> None:
    """Gradients of the first step, loss and norm of each step, weights after the last."""
    from pipeline.training.engine import full_state_dict, grad_norm
    from pipeline.training.meter import Meter
    from pipeline.training.setup import start_run
    from pipeline.training.worker import train_step

    run = start_run(spec, folder, rank, num_workers, use_gpu=False)
    loader = run.loader(Position())
    found: dict[str, Any] = {"loss": [], "norm": []}
    observe_gradients(run.engine, found)
    meter = Meter(run.num_layers, run.device)
    for step in range(STEPS):
        train_step(run, step, loader.next(), meter)
        found["loss"].append(meter.reduced()["loss"])
        found["norm"].append(grad_norm(run.engine))
    loader.close()
    found["weights"] = full_state_dict(run.engine, rank == 0)
    if rank == 0:
        torch.save(found, result)


def observe_gradients(engine: Any, found: dict[str, Any]) -> None:
    """Keep the reduced gradients that the first update is made from."""
    from deepspeed.utils import safe_get_full_grad

    original = engine.step

    def step() -> None:
        if "gradients" not in found and engine.is_gradient_accumulation_boundary():
            found["gradients"] = {
                name: safe_get_full_grad(parameter).float().clone()
                for name, parameter in engine.module.model.named_parameters()
                if parameter.requires_grad
            }
        original()

    engine.step = step


def plain_training(spec: TrainSpec, dataset: Dataset, num_steps: int = STEPS) -> dict[str, Any]:
    """The same steps without DeepSpeed, workers or accumulation."""
    split, vocabulary = dataset.split("train"), Vocabulary.of(dataset)
    model = build_model(spec, vocabulary, split.is_conditional)
    set_trainable(model, spec.train)
    objective = build_objective(spec, model)
    order = batch_order(spec, split)
    padding = Padding(
        vocabulary.pad_id,
        model.config.num_latent_layers,
        5,
        spec.train.seed,
        spec.train.word_dropout,
    )
    loader = TrainLoader(split, order, Position(), Share(0, 1, 1), padding)
    trained = [p for p in objective.parameters() if p.requires_grad]
    vectors = [p for p in trained if p.ndim < 2]
    matrices = [p for p in trained if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    beta, rate = beta_schedule(spec, 6), learning_rate_schedule(spec, 6)
    found: dict[str, Any] = {"loss": [], "norm": []}
    for step in range(num_steps):
        batch = loader.next().micro_batches[0]
        loss, _ = objective(**batch.arguments(torch.device("cpu")), beta=beta(step))
        loss.backward()
        if step == 0:
            found["gradients"] = {
                n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
            }
        found["norm"].append(float(torch.nn.utils.clip_grad_norm_(objective.parameters(), 0.5)))
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
        found["loss"].append(loss.item())
    loader.close()
    found["weights"] = {n: p.detach() for n, p in model.named_parameters()}
    return found


@pytest.fixture(scope="module")
def plain(dataset: Dataset) -> dict[str, Any]:
    return plain_training(spec_of(), dataset)


@pytest.mark.parametrize(
    ("stage", "num_workers", "micro_batch_tokens"),
    [
        (0, 2, 512),
        (1, 2, 512),
        (2, 2, 512),
        (3, 2, 512),
        (0, 2, 100),  # 3 micro-batches on each worker
        (1, 1, 130),  # 4 on one
        (2, 2, 100),
        (3, 2, 100),
        (2, 2, 5),  # more parts than documents: fillers
    ],
)
def test_steps_any_sharding_equal_a_plain_process(
    plain: dict[str, Any],
    dataset: Dataset,
    tmp_path: Path,
    stage: int,
    num_workers: int,
    micro_batch_tokens: int,
) -> None:
    spec = spec_of(deepspeed__zero_stage=stage, train__micro_batch_tokens=micro_batch_tokens)
    result = tmp_path / "result.pt"
    start_processes(sharded_training, num_workers, spec, dataset.folder, result)
    found = torch.load(result)
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert found["norm"] == pytest.approx(plain["norm"], rel=1e-4)
    _compare(found, plain)


def _compare(found: dict[str, Any], plain: dict[str, Any]) -> None:
    assert found["gradients"].keys() >= plain["gradients"].keys()
    for name, expected in plain["gradients"].items():
        scale = max(float(expected.abs().max()), 1e-3)
        assert float((found["gradients"][name] - expected).abs().max()) < 1e-4 * scale, name
    for name, expected in plain["weights"].items():
        torch.testing.assert_close(found["weights"][name], expected, rtol=0, atol=2e-4, msg=name)


VARIANTS: dict[str, dict[str, Any]] = {
    "optimus": {
        "model__latents": "single",
        "model__fusion": "embed+memory",
        "model__encoder": "separate",
        "train__free_bits_per": "dimension",
        "train__word_dropout": 0.3,
    },
    "layers_1_to_2_bag_of_words": {
        "model__latent_layers": [1, 2],
        "model__fusion": "paper",
        "train__kl_layers": [-1],
        "train__bag_of_words": 0.5,
    },
    "none": {"model__latents": "none"},
    "batch_shares_free_bits": {
        "train__free_bits_per": "batch",
        "train__free_bits": 0.037,  # the means of the three steps lie on both sides of it
        "train__kl_layers": [0, 2],
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stage", [2, 3])
def test_steps_of_a_variant_sharded_equal_a_plain_process(
    dataset: Dataset, tmp_path: Path, stage: int, variant: str
) -> None:
    options = VARIANTS[variant]
    plain = plain_training(spec_of(**options), dataset)
    spec = spec_of(deepspeed__zero_stage=stage, train__micro_batch_tokens=130, **options)
    result = tmp_path / "result.pt"
    start_processes(sharded_training, 2, spec, dataset.folder, result)
    found = torch.load(result)
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert found["norm"] == pytest.approx(plain["norm"], rel=1e-4)
    _compare(found, plain)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_any_stage_stays_finite_and_near_float32(
    plain: dict[str, Any], dataset: Dataset, tmp_path: Path, stage: int
) -> None:
    spec = spec_of(
        deepspeed__zero_stage=stage, train__precision="bf16", train__micro_batch_tokens=130
    )
    result = tmp_path / "result.pt"
    start_processes(sharded_training, 2, spec, dataset.folder, result)
    found = torch.load(result)
    assert found["loss"] == pytest.approx(plain["loss"], rel=0.02)
    for name, weight in found["weights"].items():
        assert weight.dtype == torch.float32, name
        assert torch.isfinite(weight).all(), name


def training_with_and_without_a_nan(
    rank: int, num_workers: int, spec: TrainSpec, folder: Location, result: Path
) -> None:
    """Two steps, twice; the second time with one between whose noise is NaN on one worker."""
    found = [_two_steps(rank, num_workers, spec, folder, nan) for nan in (False, True)]
    if rank == 0:
        torch.save(found, result)


def _two_steps(
    rank: int, num_workers: int, spec: TrainSpec, folder: Location, nan: bool
) -> dict[str, Any]:
    from pipeline.training.engine import full_state_dict
    from pipeline.training.meter import Meter
    from pipeline.training.setup import start_run
    from pipeline.training.worker import train_step

    run = start_run(spec, folder, rank, num_workers, use_gpu=False)
    loader, meter = run.loader(Position()), Meter(run.num_layers, run.device)
    first, second = loader.next(), loader.next()
    loader.close()
    updated = [train_step(run, 0, first, meter)]
    if nan:
        poison = math.nan if rank == num_workers - 1 else 1.0
        parts = tuple(replace(m, noise=m.noise * poison) for m in second.micro_batches)
        updated.append(train_step(run, 1, replace(second, micro_batches=parts), meter))
    updated.append(train_step(run, 1, second, meter))
    weights = full_state_dict(run.engine, rank == 0)
    return {"updated": updated, "row": meter.reduced(), "weights": weights}


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16")]
)
def test_step_with_a_nan_on_one_worker_is_left_out_by_all(
    dataset: Dataset, tmp_path: Path, stage: int, precision: str
) -> None:
    spec = spec_of(deepspeed__zero_stage=stage, train__precision=precision)
    result = tmp_path / "result.pt"
    start_processes(training_with_and_without_a_nan, 2, spec, dataset.folder, result)
    straight, skipped = torch.load(result)
    assert straight["updated"] == [True, True]
    assert skipped["updated"] == [True, False, True]
    assert skipped["row"] == straight["row"]
    for name, expected in straight["weights"].items():
        assert torch.equal(skipped["weights"][name], expected), name
