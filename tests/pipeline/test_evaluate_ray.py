"""The evaluate stage on a real Ray."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.evaluation.documents import DocumentFigures
from pipeline.shards import Dataset
from pipeline.specs import EvaluateSpec
from pipeline.stages.evaluate import run_evaluate
from pipeline.storage import Location
from tests.pipeline.evaluation_data import evaluate_spec, small_test_dataset, write_weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]
DOCUMENTS = 300  # three blocks


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
def on_one_worker(
    weights: Location, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    output = tmp_path_factory.mktemp("one")
    return evaluate(weights, dataset, output, evaluate_spec(num_workers=1)), output


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if name == "standard_errors":
            for key, error in value.items():
                assert found[name][key] == pytest.approx(error, rel=1e-5), key
        elif isinstance(value, float) or name == "kl_per_layer":
            assert found[name] == pytest.approx(value, rel=1e-6), name
        else:
            assert found[name] == value, name


def test_two_workers_give_the_figures_of_one(
    on_one_worker: tuple[dict[str, Any], Path], weights: Location, dataset: Dataset, tmp_path: Path
) -> None:
    expected, _ = on_one_worker
    found = evaluate(weights, dataset, tmp_path, evaluate_spec(num_workers=2, batch_tokens=500))
    assert_same(found, expected)


def test_figures_and_texts_are_complete(
    on_one_worker: tuple[dict[str, Any], Path], dataset: Dataset
) -> None:
    figures, output = on_one_worker
    assert figures["num_documents"] == DOCUMENTS
    assert figures["num_tokens"] == dataset.split("test").num_predicted_tokens
    assert figures["split"] == "test"
    assert len(figures["samples"]) == 3
    assert [set(pair) for pair in figures["reconstructions"]] == [{"source", "reconstruction"}] * 4
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
    for text in ("Reconstruction NLL", "−ELBO", "IW-NLL", "Perplexity per word", "units above"):
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
    save = DocumentFigures.save
    saved: list[str] = []

    def interrupted_after_two(self: DocumentFigures, file: Location) -> None:
        save(self, file)
        saved.append(file.name)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(DocumentFigures, "save", interrupted_after_two)
    with pytest.raises(KeyboardInterrupt):
        evaluate(weights, dataset, tmp_path, evaluate_spec(num_workers=1))
    assert len(list((tmp_path / "blocks").iterdir())) == 2
    found = evaluate(weights, dataset, tmp_path, evaluate_spec(num_workers=2))
    assert len(saved) == 3
    assert len(set(saved)) == 3
    assert_same(found, expected)


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
                    if "BlockEvaluator" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                        break
            time.sleep(0.05)

    killer = threading.Thread(target=kill_one)
    killer.start()
    found = evaluate(weights, dataset, tmp_path, evaluate_spec(num_workers=2, iw_samples=3))
    killer.join()
    assert killed
    assert_same(found, expected)


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
