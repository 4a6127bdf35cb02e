from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from della_model import gpt2_config
from pipeline.artifact import Artifact
from pipeline.errors import UserError
from pipeline.shards import Dataset
from pipeline.storage import Location
from pipeline.weights import check_tokenizer, fingerprint_weights, load_model, resolve_weights
from tests.pipeline.evaluation_data import small_test_dataset, write_weights


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_test_dataset(tmp_path_factory.mktemp("data"), documents=5)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> Location:
    return write_weights(tmp_path_factory.mktemp("weights"), dataset)


@pytest.fixture
def weights(original: Location, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original.path, tmp_path / "copy"))


def artifact(folder: Path, stage: str) -> Location:
    location = Location.parse(folder)
    Artifact(location, stage, "f" * 64, {}, {}, "done", "2026-01-01T00:00:00+00:00").save()
    return location


def test_training_artifact_means_its_best_weights(weights: Path, tmp_path: Path) -> None:
    run = artifact(tmp_path / "run", "train")
    with pytest.raises(UserError, match="without weights/best"):
        resolve_weights(run)
    shutil.copytree(weights, tmp_path / "run" / "weights" / "best")
    assert resolve_weights(run).path == str(tmp_path / "run" / "weights" / "best")
    assert load_model(run).config.latent_size == 5


def test_from_pretrained_folder_means_itself(weights: Path) -> None:
    assert resolve_weights(Location.parse(weights)).path == str(weights)


def test_other_folder_is_refused_with_the_right_one(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_weights(Location.parse(tmp_path / "nowhere"))
    shutil.copytree(weights, tmp_path / "weights" / "best")
    with pytest.raises(UserError, match=r"give .*/weights/best"):
        resolve_weights(Location.parse(tmp_path / "weights"))
    with pytest.raises(UserError, match="artifact of the stage preprocess"):
        resolve_weights(artifact(tmp_path / "data", "preprocess"))


def test_fingerprint_follows_content_and_not_place(weights: Path, original: Location) -> None:
    first = fingerprint_weights(original)
    assert fingerprint_weights(Location.parse(weights)) == first
    config = json.loads((weights / "config.json").read_text())
    config["_name_or_path"], config["transformers_version"] = "elsewhere", "9"
    (weights / "config.json").write_text(json.dumps(config))
    assert fingerprint_weights(Location.parse(weights)) == first
    file = weights / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, file, {"format": "pt"})
    assert fingerprint_weights(Location.parse(weights)) != first


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_weights_are_refused(weights: Path, value: float) -> None:
    file = weights / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"NaN or infinite weights \(1 tensors.*{name}"):
        load_model(Location.parse(weights))


def test_another_model_is_refused_by_its_type(tmp_path: Path) -> None:
    GPT2LMHeadModel(gpt2_config("tiny", 50)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="type 'gpt2': expected 'della'"):
        load_model(Location.parse(tmp_path))


def test_cut_off_safetensors_are_refused(weights: Path) -> None:
    file = weights / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"cannot be loaded.*damaged"):
        load_model(Location.parse(weights))
    file.unlink()
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        load_model(Location.parse(weights))


def test_missing_tensors_are_refused(weights: Path) -> None:
    file = weights / "model.safetensors"
    tensors = load_file(file)
    del tensors["chain.posterior_from_features.2.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 .*chain\.posterior_from_features\.2\.weight"):
        load_model(Location.parse(weights))


def test_same_tokenizer_passes_and_none_is_refused(weights: Path, dataset: Dataset) -> None:
    check_tokenizer(Location.parse(weights), dataset)
    (weights / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        check_tokenizer(Location.parse(weights), dataset)
