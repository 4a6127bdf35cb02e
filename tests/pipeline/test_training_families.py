"""Every family of backbones, pretrained, on real workers and every ZeRO stage, against one process.

All runs are made by two processes that start once: starting them costs more than the runs.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from della_model import Della
from della_model.backbones import BACKBONES
from pipeline.batches import Position
from pipeline.shards import Dataset
from pipeline.specs import TrainSpec
from pipeline.storage import Location
from tests.della_model.backbone_data import FAMILIES
from tests.pipeline.preprocess_data import make_lines, make_spec, write_dataset
from tests.pipeline.test_training_sharding import (
    observe_gradients,
    plain_training,
    start_processes,
)
from tests.pipeline.train_data import train_spec

pytestmark = pytest.mark.slow
VOCABULARY, CONTEXT = 300, 64
# T5 1.1 differs from T5 in nothing that sharding could touch.
TRAINED = {family: config for family, config in FAMILIES.items() if family != "t5 v1.1"}
LORA = {"trainable": "lora", "lora": {"rank": 3, "alpha": 6}}


def write_pairs(folder: Path) -> Dataset:
    sources, targets = make_lines(60, 1), make_lines(60, 2)
    rows = [{"source": s, "target": t} for s, t in zip(sources, targets, strict=True)]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = {
        "kind": "jsonl", "train": str(file), "source_field": "source", "text_field": "target",
        "max_tokens": 30, "max_source_tokens": 30, "max_rejected": 1.0, "valid_fraction": 0,
        "test_fraction": 0,
    }  # fmt: skip
    return write_dataset(make_spec(corpus), folder / "pairs")


def write_backbone(family: str, folder: Path) -> Path:
    config = copy.deepcopy(FAMILIES[family])
    for name in ("max_position_embeddings", "n_positions"):
        if hasattr(config, name):
            setattr(config, name, CONTEXT)
    config.vocab_size = VOCABULARY
    torch.manual_seed(7)
    BACKBONES[config.model_type].model_class(config).save_pretrained(
        folder / family, max_shard_size="40KB"
    )
    return folder / family


def spec_of(backbone: Path, stage: int, **train: Any) -> TrainSpec:
    settings = {
        "batch_tokens": 300,
        "micro_batch_tokens": 100,
        "warmup_steps": 0,
        "max_steps": 6,
        "beta": {"kind": "constant", "value": 0.7},
    }
    model = {"backbone": str(backbone), "size": None, "latent_size": 5, "dropout": 0.0}
    spec = train_spec(deepspeed__zero_stage=stage).model_dump()
    spec["model"] = model
    spec["train"] |= settings | train
    return TrainSpec.build(spec)


def run_all(rank: int, num_workers: int, cases: dict[str, Any], folder: Path) -> None:
    for name, (spec, dataset, exports) in cases.items():
        torch.save(run_one(rank, num_workers, spec, dataset, exports), folder / f"{name}-{rank}.pt")


def run_one(
    rank: int, num_workers: int, spec: TrainSpec, dataset: Location, exports: Path | None
) -> dict[str, Any]:
    from pipeline.training.export import export_weights
    from pipeline.training.meter import Meter
    from pipeline.training.setup import start_run
    from pipeline.training.worker import train_step

    run = start_run(spec, dataset, rank, num_workers, use_gpu=False)
    found: dict[str, Any] = {"shares": [p.numel() for p in run.engine.module.parameters()]}
    loader = run.loader(Position())
    observe_gradients(run.engine, found)
    meter = Meter(run.num_layers, run.device)
    train_step(run, 0, loader.next(), meter)
    loader.close()
    found["loss"] = meter.reduced()["loss"]
    found["parameters"] = run.parameters
    if exports is not None:
        export_weights(run.engine, spec, run.tokenizer_folder, Location.parse(exports), rank == 0)
    return found


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    folder = tmp_path_factory.mktemp("data")
    lines = folder / "lines.txt"
    lines.write_text("".join(line + "\n" for line in make_lines(80, 3)))
    corpus = {"train": str(lines), "max_tokens": 60, "max_rejected": 1.0, "valid_fraction": 0,
              "test_fraction": 0}  # fmt: skip
    return {
        "texts": write_dataset(make_spec(corpus), folder / "texts"),
        "pairs": write_pairs(folder),
    }


def cases_of(folder: Path) -> dict[str, tuple[TrainSpec, str, Path | None]]:
    """Name → spec, dataset, where to export."""
    cases: dict[str, tuple[TrainSpec, str, Path | None]] = {}
    for family, config in TRAINED.items():
        backbone = write_backbone(family, folder)
        data = "pairs" if BACKBONES[config.model_type].is_encoder_decoder else "texts"
        # 3 first: a run begins with reading its backbone, before any engine was there.
        for stage in (3, 0, 1, 2):
            cases[f"{family}-{stage}"] = (spec_of(backbone, stage), data, None)
    cases["llama-pairs-3"] = (spec_of(folder / "llama", 3), "pairs", folder / "out-pairs")
    for stage in (0, 3):
        for family in ("gpt2", "llama"):
            spec = spec_of(folder / family, stage, **LORA)
            cases[f"{family}-lora-{stage}"] = (spec, "texts", folder / f"out-{family}-{stage}")
    cases["qwen3-latents-3"] = (spec_of(folder / "qwen3", 3, trainable="latents"), "texts", None)
    checkpointed = spec_of(folder / "llama", 3, activation_checkpointing=True)
    cases["llama-checkpointed-3"] = (checkpointed, "texts", None)
    return cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backbones")


@pytest.fixture(scope="module")
def cases(folder: Path) -> dict[str, tuple[TrainSpec, str, Path | None]]:
    return cases_of(folder)


@pytest.fixture(scope="module")
def ran(cases: Any, datasets: dict[str, Dataset], folder: Path) -> Path:
    named = {name: (s, datasets[data].folder, out) for name, (s, data, out) in cases.items()}
    start_processes(run_all, 2, named, folder)
    return folder


NAMES = [f"{family}-{stage}" for family in TRAINED for stage in range(4)] + [
    "llama-pairs-3", "gpt2-lora-0", "gpt2-lora-3", "llama-lora-0", "llama-lora-3",
    "qwen3-latents-3", "llama-checkpointed-3",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_family_on_workers_gives_the_gradients_of_one_process(
    name: str, cases: Any, datasets: dict[str, Dataset], ran: Path
) -> None:
    spec, data, _ = cases[name]
    found = torch.load(ran / f"{name}-0.pt", weights_only=False)
    plain = plain_training(spec, datasets[data], num_steps=1)
    assert found["loss"] == pytest.approx(plain["loss"][0], rel=1e-5)
    assert found["gradients"].keys() == plain["gradients"].keys()
    for key, expected in plain["gradients"].items():
        scale = max(float(expected.abs().max()), 1e-3)
        assert float((found["gradients"][key] - expected).abs().max()) < 2e-4 * scale, key


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("-3")])
def test_family_under_zero_3_is_never_whole_on_a_worker(name: str, ran: Path) -> None:
    shares = [torch.load(ran / f"{name}-{r}.pt", weights_only=False)["shares"] for r in (0, 1)]
    assert max(map(sum, shares)) == 0  # all is in shards, gathered only while a module runs


@pytest.mark.parametrize("name", ["gpt2-lora-0", "gpt2-lora-3", "llama-lora-0", "llama-lora-3"])
def test_family_low_rank_run_exports_adapters_and_merged_weights(
    name: str, cases: Any, ran: Path
) -> None:
    from peft import PeftModel

    spec, _, out = cases[name]
    family = name.split("-")[0]
    plain = BACKBONES[family].model_class.from_pretrained(spec.model.backbone)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    merged = PeftModel.from_pretrained(plain, out / "adapter").merge_and_unload().state_dict()
    moved = [key for key in before if not torch.equal(before[key], merged[key])]
    assert len(moved) == {"gpt2": 3, "llama": 6}[family]
    loaded = Della.from_pretrained(out)
    for key, value in loaded.backbone.state_dict().items():
        if ".fusion." not in key:
            expected = merged[key.replace(".projection", "")]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-7, msg=key)
    counts = torch.load(ran / f"{name}-0.pt", weights_only=False)["parameters"]
    updates = load_file(out / "adapter" / "adapter_model.safetensors")
    in_updates = sum(value.numel() for value in updates.values())
    assert counts.trained == counts.latent + in_updates
    assert counts.total == loaded.num_parameters() + in_updates


def test_family_latents_alone_leave_the_backbone(cases: Any, ran: Path) -> None:
    found = torch.load(ran / "qwen3-latents-3-0.pt", weights_only=False)
    assert found["parameters"].trained == found["parameters"].latent
    parts = ("fusion", "chain", "pooling")
    assert all(any(part in name for part in parts) for name in found["gradients"])


def test_family_conditional_weights_load_and_generate(cases: Any, ran: Path) -> None:
    model = Della.from_pretrained(cases["llama-pairs-3"][2])
    assert model.config.conditional
    assert model.config.backbone.model_type == "llama"
