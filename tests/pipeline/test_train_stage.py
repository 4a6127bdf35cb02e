"""The train stage: real runs, real kills, and every bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import UserError
from pipeline.external import fingerprints as external_inputs
from pipeline.shards import Dataset
from pipeline.specs import TrainSpec
from pipeline.stages.train import check_inputs
from pipeline.storage import Location
from pipeline.training.metrics import read_rows
from pipeline.training.store import CHECKPOINTS
from tests.pipeline.train_data import small_dataset, train_spec
from tests.pipeline.train_runs import resumable, run, weights_in


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def straight(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Location]:
    """An uninterrupted run on two workers."""
    output = Location.parse(tmp_path_factory.mktemp("straight"))
    return run(resumable(), dataset, output), output


@pytest.mark.slow
def test_run_two_workers_leaves_metrics_weights_and_figures(
    straight: tuple[dict, Location], dataset: Dataset
) -> None:
    from della_model import Della

    figures, output = straight
    assert figures["steps"] == 40
    assert figures["num_workers"] == 2
    assert figures["last"]["step"] == 40
    assert 0 < figures["num_latent_parameters"] < figures["num_parameters"]
    rows = read_rows(output)
    train = [row["step"] for row in rows if row["kind"] == "train"]
    assert train == sorted({*range(3, 41, 3), *range(5, 41, 5)})
    assert [row["step"] for row in rows if row["kind"] == "valid"] == [10, 20, 30, 40]
    assert (
        sum(r["num_documents"] for r in rows if r["kind"] == "train") == figures["documents_seen"]
    )
    assert sum(r["num_tokens"] for r in rows if r["kind"] == "train") == figures["tokens_seen"]
    assert {len(row["kl_per_layer"]) for row in rows} == {4}
    values = [row["negative_elbo"] for row in rows if row["kind"] == "valid"]
    assert values[-1] < values[0]
    assert figures["best"]["negative_elbo"] == min(values)
    for name in ("last", "best"):
        folder = Path(output.path) / "weights" / name
        model = Della.from_pretrained(folder)
        assert model.dtype == torch.float32
        assert (folder / "tokenizer.json").is_file()
    kept = [child.name for child in (output / CHECKPOINTS).children() if "step-" in child.name]
    assert kept == ["step-000000035", "step-000000040"]


@pytest.mark.slow
def test_run_exported_weights_give_the_validation_figures(
    straight: tuple[dict, Location], dataset: Dataset
) -> None:
    from della_model import Della
    from pipeline.training.loader import Padding, Share, validation_batches

    figures, output = straight
    model = Della.from_pretrained(Path(output.path) / "weights" / "last").eval()
    padding = Padding(0, 4, 5, seed=0)
    (batch,) = validation_batches(dataset.split("valid"), 2000, 10**6, Share(0, 1, 1), padding)
    with torch.no_grad():
        terms = model.elbo_terms(batch.input_ids, batch.attention_mask, batch.noise)
    assert float(terms.kl_per_layer.sum(-1).mean()) == pytest.approx(
        figures["last"]["kl"], rel=1e-4
    )
    nll = figures["last"]["reconstruction_nll"]
    assert float(terms.reconstruction_nll.mean()) == pytest.approx(nll, rel=1e-5)


@pytest.mark.slow
def test_run_bf16_zero3_without_validation_split_ends_with_best_as_last(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "data", train=60, valid=0)
    output = Location.parse(tmp_path / "run")
    spec = train_spec(
        train__precision="bf16", train__num_workers=2, train__max_steps=3, deepspeed__zero_stage=3
    )
    figures = run(spec, dataset, output)
    assert figures["best"] is None
    for name, value in weights_in(output, "best").items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, weights_in(output, "last")[name])


@pytest.mark.slow
def test_run_user_error_in_a_worker_ends_the_run_at_once(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "data", train=60, valid=0)
    part = next((tmp_path / "data" / "train").glob("*.parquet"))
    # The driver's checks read the footer and the lengths alone: damage the tokens.
    column = pq.ParquetFile(part).metadata.row_group(0).column(1)
    assert column.path_in_schema.startswith("input_ids")
    data = bytearray(part.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 40] = bytes(40)
    part.write_bytes(bytes(data))
    with pytest.raises(UserError, match=part.name):
        run(train_spec(train__max_failures=3), dataset, Location.parse(tmp_path / "run"))


@pytest.mark.slow
def test_run_that_diverges_stops_and_names_its_last_checkpoint(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "data", train=60, valid=0)
    spec = train_spec(
        train__max_steps=30,
        train__learning_rate=1e30,
        train__warmup_steps=0,
        train__max_skipped_steps=3,
        train__checkpoint_every=2,
    )
    sentence = r"not finite in 4 steps in a row.*train.learning_rate.*checkpoints/step-0000000\d\d"
    with pytest.raises(UserError, match=sentence):
        run(spec, dataset, Location.parse(tmp_path / "run"))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model__context": 16}, r"longest document .* context is 16.*set model.context="),
        ({"model__size": "tinny"}, r"model.size.*tinny.*tiny"),
        ({"model__fusion": "low_rnk"}, r"model.fusion.*low_rnk.*low_rank"),
        ({"model__latent_layers": (2, 9)}, r"model.latent_layers.*0 to 3"),
        ({"train__kl_layers": (0, 9)}, r"train.kl_layers.*from 0 to 3.*got 9"),
        (
            {"model__latents": "none", "train__bag_of_words": 0.5},
            r"train.bag_of_words.*without latents",
        ),
        ({"train__batch_tokens": 16}, r"longest document.*train.batch_tokens=16"),
        ({"deepspeed__extra": {"zero": 1}}, r"deepspeed.extra.zero is no section"),
        ({"model__size": None, "model__backbone": "/no/such"}, r"model.backbone=/no/such cannot"),
    ],
)
def test_check_inputs_bad_spec_is_one_sentence(
    dataset: Dataset, values: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        check_inputs(train_spec(**values), dataset.folder)
    assert "\n" not in caught.value.message


def test_check_inputs_backbone_with_too_few_embeddings_is_refused(
    dataset: Dataset, tmp_path: Path
) -> None:
    backbone = save_backbone(tmp_path / "gpt2", vocab_size=50)
    with pytest.raises(UserError, match=r"tokenizer has 3\d\d ids.*embeddings for 50"):
        check_inputs(train_spec(model__size=None, model__backbone=backbone), dataset.folder)


def test_check_inputs_folder_without_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no manifest.json"):
        check_inputs(train_spec(), Location.parse(tmp_path))


def test_external_inputs_follow_the_backbones_content(tmp_path: Path) -> None:
    first = save_backbone(tmp_path / "a", vocab_size=50)
    found = external_inputs(train_spec(model__size=None, model__backbone=first))
    moved = (tmp_path / "a").rename(tmp_path / "b")
    assert external_inputs(train_spec(model__size=None, model__backbone=str(moved))) == found
    other = save_backbone(tmp_path / "c", vocab_size=51)
    assert external_inputs(train_spec(model__size=None, model__backbone=other)) != found
    assert external_inputs(train_spec()) == {}
    assert (
        external_inputs(train_spec(model__size=None, model__backbone="gpt2")).keys() == found.keys()
    )


def save_backbone(folder: Path, vocab_size: int) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=vocab_size, n_positions=64, n_layer=2, n_embd=20, n_head=2)
    config.bos_token_id = config.eos_token_id = 1
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_run_more_workers_than_cpus_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.num_workers=64 needs 64 CPUs"):
        run(train_spec(train__num_workers=64), dataset, Location.parse(tmp_path))


@pytest.mark.slow
def test_run_gpu_that_is_not_there_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=r"use_gpu=true needs 1 GPUs"):
        run(train_spec(train__use_gpu=True), dataset, Location.parse(tmp_path))


@pytest.mark.slow
def test_run_pretrained_backbone_trains(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "data", train=60, valid=10)
    backbone = save_backbone(tmp_path / "gpt2", vocab_size=400)
    spec = train_spec(model__size=None, model__backbone=backbone, train__max_steps=2)
    figures = run(spec, dataset, Location.parse(tmp_path / "run"))
    assert figures["best"]["num_documents"] == 10


def test_spec_survives_its_json() -> None:
    spec = resumable(model__latent_layers=(1, 2))
    assert TrainSpec.build(json.loads(spec.model_dump_json())) == spec
