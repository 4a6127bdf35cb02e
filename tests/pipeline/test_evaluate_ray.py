"""The evaluate stage on a real Ray."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from transformers import GPT2LMHeadModel

from della_model import gpt2_config
from pipeline.errors import UserError
from pipeline.evaluation.blocks import Arrays, save_arrays
from pipeline.shards import Dataset
from pipeline.specs import EvaluateSpec
from pipeline.stages.evaluate import run_evaluate
from pipeline.storage import Location
from pipeline.tokenization import load_tokenizer, vocabulary_size
from tests.pipeline.evaluation_data import evaluate_spec, small_test_dataset, write_weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]
DOCUMENTS = 300  # five blocks


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_test_dataset(tmp_path_factory.mktemp("data"), documents=DOCUMENTS)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> Location:
    return write_weights(tmp_path_factory.mktemp("weights"), dataset)


def evaluate(
    weights: Location, dataset: Dataset, output: Path, spec: EvaluateSpec
) -> dict[str, Any]:
    inputs = {"weights": weights, "dataset": dataset.folder}
    return run_evaluate(spec, inputs, Location.parse(output))


@pytest.fixture(scope="module")
def reference_model(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> str:
    folder = tmp_path_factory.mktemp("reference")
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = gpt2_config(
        "tiny",
        vocabulary_size(tokenizer),
        n_positions=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def on_one_worker(
    weights: Location,
    dataset: Dataset,
    reference_model: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], Path]:
    output = tmp_path_factory.mktemp("one")
    spec = evaluate_spec(num_workers=1, reference_model=reference_model)
    return evaluate(weights, dataset, output, spec), output


def without_reference(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation that was given no reference model."""
    figures = copy.deepcopy(figures)
    for of_texts in (figures["generation"][name] for name in ("samples", "real")):
        del of_texts["reference_ppl"], of_texts["standard_errors"]["reference_ppl"]
    return figures


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Figures equal to 1e-6; texts and counts to the letter."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    elif isinstance(expected, float):
        # Points of the plot are rounded to four digits.
        tolerance = 2e-4 if ".projection.points" in where else 1e-6
        assert found == pytest.approx(expected, rel=1e-6, abs=tolerance), where
    else:
        assert found == expected, where


def test_two_workers_give_the_figures_of_one(
    on_one_worker: tuple[dict[str, Any], Path],
    weights: Location,
    dataset: Dataset,
    reference_model: str,
    tmp_path: Path,
) -> None:
    expected, _ = on_one_worker
    spec = evaluate_spec(num_workers=2, batch_tokens=500, reference_model=reference_model)
    found = evaluate(weights, dataset, tmp_path, spec)
    assert_same(found, expected)


def test_reference_model_judges_samples_and_real_documents(
    on_one_worker: tuple[dict[str, Any], Path], dataset: Dataset, reference_model: str
) -> None:
    figures, output = on_one_worker
    lines = [json.loads(line) for line in (output / "texts.jsonl").read_text().splitlines()]
    samples = [line["text"] for line in lines if line["kind"] == "sample"]
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    model = GPT2LMHeadModel.from_pretrained(reference_model)
    nll, predicted = 0.0, 0
    for text in samples:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        if ids.shape[1] > 1:
            with torch.no_grad():
                nll += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            predicted += ids.shape[1] - 1
    assert figures["generation"]["samples"]["reference_ppl"] == pytest.approx(
        math.exp(nll / predicted), rel=1e-5
    )
    assert figures["generation"]["real"]["reference_ppl"] > 1


def test_figures_and_texts_are_complete(
    on_one_worker: tuple[dict[str, Any], Path], dataset: Dataset
) -> None:
    figures, output = on_one_worker
    assert figures["num_documents"] == DOCUMENTS
    assert figures["num_tokens"] == dataset.split("test").num_predicted_tokens
    assert figures["split"] == "test"
    assert len(figures["samples"]) == 8  # of nine, as many as are shown
    assert [set(pair) for pair in figures["reconstructions"]] == [{"source", "reconstruction"}] * 6
    assert [len(path["texts"]) for path in figures["interpolations"]] == [7]
    assert figures["mutual_information"] <= figures["aggregate_posterior"]["log_documents"]
    assert [point["samples"] for point in figures["iw_curve"]["points"]] == [1, 2, 5]
    assert len(figures["probe"]["layers"]) == 4
    assert figures["generation"]["samples"].keys() == figures["generation"]["real"].keys()
    assert 0 <= figures["reconstruction"]["edit_distance"] <= 1
    lines = (output / "texts.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["sample"] * 9 + ["reconstruction"] * 7
    assert figures["reconstructions"][0]["source"].endswith(".")
    assert len(figures["kl_per_layer"]) == 4
    rows = pq.read_table(output / "documents.parquet")
    assert rows.num_rows == DOCUMENTS
    mean = sum(rows.column("iw_nll").to_pylist()) / DOCUMENTS
    assert mean == pytest.approx(figures["iw_nll"], rel=1e-12)
    assert not (output / "blocks").exists()


def test_printed_table_has_every_figure_and_text(
    on_one_worker: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from pipeline.evaluation.table import print_evaluation

    figures, _ = on_one_worker
    figures = {**figures, "samples": ["a [bold]b[/bold] sample", ""]}
    print_evaluation(figures, Console(width=120))
    printed = capsys.readouterr().out
    for text in (
        "MI",
        "Self-BLEU",
        "9 texts",
        "Reconstruction NLL",
        "−ELBO",
        "IW-NLL",
        "Perplexity per word",
        "units above",
    ):
        assert text in printed
    assert "a [bold]b[/bold] sample" in printed
    assert "(empty)" in printed


def test_interrupted_evaluation_goes_on_from_its_blocks(
    on_one_worker: tuple[dict[str, Any], Path],
    weights: Location,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, _ = on_one_worker
    saved: list[str] = []

    def interrupted_after_two(arrays: Arrays, file: Location) -> None:
        save_arrays(arrays, file)
        saved.append(file.name)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.stages.evaluate.save_arrays", interrupted_after_two)
    with pytest.raises(KeyboardInterrupt):
        evaluate(weights, dataset, tmp_path, evaluate_spec(num_workers=1))
    assert len(list((tmp_path / "blocks").iterdir())) == 2
    found = evaluate(weights, dataset, tmp_path, evaluate_spec(num_workers=2))
    assert len(saved) == len(set(saved))  # no block was done twice
    assert_same(found, without_reference(expected))


def test_killed_worker_is_replaced(
    on_one_worker: tuple[dict[str, Any], Path],
    weights: Location,
    dataset: Dataset,
    tmp_path: Path,
) -> None:
    expected, _ = on_one_worker
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for process in psutil.Process().children(recursive=True):  # of this test's Ray alone
                with contextlib.suppress(psutil.Error):
                    if "Evaluator" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                        break
            time.sleep(0.05)

    killer = threading.Thread(target=kill_one)
    killer.start()
    found = evaluate(weights, dataset, tmp_path, evaluate_spec(num_workers=2, iw_samples=3))
    killer.join()
    assert killed
    assert_same(found, without_reference(expected))


def test_worker_that_cannot_load_says_why(
    weights: Location, dataset: Dataset, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    bad = Location.parse(tmp_path / "bad")
    bad.upload(Path(weights.path))
    file = Path(bad.path) / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="NaN or infinite weights") as caught:
        evaluate(bad, dataset, tmp_path / "out", evaluate_spec(num_workers=2))
    assert type(caught.value) is UserError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_workers": 4000}, "evaluate.num_workers=4000 needs 4000 CPUs"),
        ({"use_gpu": True}, "GPUs, but the cluster has"),
    ],
)
def test_more_than_the_cluster_has_is_refused(
    weights: Location, dataset: Dataset, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(weights, dataset, tmp_path, evaluate_spec(**values))


def test_max_documents_takes_the_first(
    weights: Location, dataset: Dataset, tmp_path: Path, on_one_worker: tuple[dict[str, Any], Path]
) -> None:
    _, whole = on_one_worker
    figures = evaluate(weights, dataset, tmp_path, evaluate_spec(max_documents=17, num_samples=0))
    assert figures["num_documents"] == 17
    assert figures["samples"] == []
    first = pq.read_table(tmp_path / "documents.parquet").column("iw_nll").to_pylist()
    expected = pq.read_table(whole / "documents.parquet").column("iw_nll").to_pylist()[:17]
    assert first == pytest.approx(expected, rel=1e-6)
