from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifact import Artifact
from pipeline.errors import UserError
from pipeline.evaluation.metrics.errors import mean, perplexity
from pipeline.report.finding import evaluation_of
from pipeline.report.pairing import DocumentTable, difference
from pipeline.specs import ReportSpec
from pipeline.stages.report import run_report
from pipeline.storage import Location
from tests.pipeline.test_report import WHOLE, write_run

STARTED = "2026-01-02T05:00:00+00:00"
COUNT = 400


def write_evaluation(
    folder: Path,
    index: int,
    shift: float = 0.0,
    *,
    reverse: bool = False,
    tokens: int = 0,
    documents: str = "d",
) -> Location:
    """An evaluation of 400 documents, each `shift` nats and a little noise above the first's."""
    shared, own = np.random.default_rng(0), np.random.default_rng(index + 1)
    nll = shared.normal(40, 12, COUNT) + shift + own.normal(0, 0.5, COUNT)
    lengths = shared.integers(5, 30, COUNT) + tokens
    kl = np.abs(own.normal(2, 0.3, COUNT))
    order = slice(None, None, -1) if reverse else slice(None)
    columns = {
        "document_id": [f"{documents}{i}" for i in range(COUNT)][order],
        "reconstruction_nll": (nll - kl + 0.5)[order],
        "kl": kl[order],
        "iw_nll": nll[order],
        "num_predicted": lengths[order],
        "num_words": (lengths - tokens)[order],
    }
    location = Location.parse(folder / "evaluate" / f"e{index}{documents}")
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    (location / "documents.parquet").write_bytes(buffer.getvalue())
    pairs = {
        "reconstruction_nll": mean(nll - kl + 0.5),
        "kl": mean(kl),
        "negative_elbo": mean(nll + 0.5),
        "iw_nll": mean(nll),
        "ppl_token": perplexity(nll, lengths),
        "ppl_word": perplexity(nll, lengths - tokens),
    }
    figures = WHOLE | {name: value for name, (value, _) in pairs.items()}
    figures["standard_errors"] = {name: error for name, (_, error) in pairs.items()} | {
        "mutual_information": 0.05,
        "kl_per_layer": [0.1, 0.1],
    }
    return (
        Artifact(
            location,
            "evaluate",
            f"{index:064x}",
            {"split": "test"},
            {"weights": f"{index + 50:064x}", "dataset": "cd" * 32},
            "done",
            STARTED,
            figures=figures,
        )
        .save()
        .folder
    )


def write_evaluations(folder: Path, count: int) -> list[Location]:
    """The same but for 2 nats from one to the next."""
    return [write_evaluation(folder, index, -2.0 * index) for index in range(count)]


def load(*folders: Location) -> tuple[list[Artifact], tuple[DocumentTable, DocumentTable]]:
    artifacts = [Artifact.load(folder) for folder in folders]
    first, second = (DocumentTable.of(artifact) for artifact in artifacts)
    return artifacts, (first, second)


def test_difference_over_the_same_documents_has_the_error_of_their_differences(
    tmp_path: Path,
) -> None:
    one = write_evaluation(tmp_path, 0)
    other = write_evaluation(tmp_path, 1, -1.0, reverse=True)
    artifacts, tables = load(other, one)
    found = difference("iw_nll", *artifacts, tables)
    assert found is not None
    assert found.paired
    assert found.value == pytest.approx(-1.0, abs=0.2)
    # Both have noise of ½ nat of their own; the 12 nats that documents differ by are gone.
    assert found.error == pytest.approx(math.hypot(0.5, 0.5) / math.sqrt(COUNT), rel=0.15)
    assert found.larger


def test_difference_of_perplexities_agrees_with_the_bootstrap(tmp_path: Path) -> None:
    artifacts, tables = load(write_evaluation(tmp_path, 1, -0.5), write_evaluation(tmp_path, 0))
    found = difference("ppl_token", *artifacts, tables)
    assert found is not None
    draws = np.random.default_rng(2).integers(0, COUNT, (4000, COUNT))
    resampled = []
    for table in tables:
        nll, units = table.columns["iw_nll"], table.columns["num_predicted"]
        resampled.append(np.exp(nll[draws].sum(axis=1) / units[draws].sum(axis=1)))
    assert found.error == pytest.approx(np.std(resampled[0] - resampled[1]), rel=0.1)


def test_difference_within_its_error_is_said_to_be(tmp_path: Path) -> None:
    artifacts, tables = load(write_evaluation(tmp_path, 1), write_evaluation(tmp_path, 0))
    found = difference("iw_nll", *artifacts, tables)
    assert found is not None
    assert not found.larger


def test_difference_over_other_documents_is_not_paired(tmp_path: Path) -> None:
    artifacts, tables = load(
        write_evaluation(tmp_path, 1, -1.0), write_evaluation(tmp_path, 0, documents="other")
    )
    found = difference("iw_nll", *artifacts, tables)
    assert found is not None
    assert not found.paired
    errors = [artifact.figures["standard_errors"]["iw_nll"] for artifact in artifacts]
    assert found.error == pytest.approx(math.hypot(*errors))
    assert not found.larger
    assert difference("ppl_token", *artifacts, tables) is None


def test_perplexity_per_token_of_other_tokens_is_not_compared(tmp_path: Path) -> None:
    artifacts, tables = load(write_evaluation(tmp_path, 1, tokens=3), write_evaluation(tmp_path, 0))
    assert difference("ppl_token", *artifacts, tables) is None
    per_word = difference("ppl_word", *artifacts, tables)
    assert per_word is not None
    assert per_word.paired


def compare(folder: Path, **values: Any) -> tuple[dict[str, Any], Any, str, str]:
    inputs = {f"runs.{i}": one for i, one in enumerate(write_evaluations(folder, 3))}
    output = folder / "out"
    figures = run_report(ReportSpec(**values), inputs, Location.parse(output))
    texts = [(output / f"report.{kind}").read_text() for kind in ("json", "md", "html")]
    return figures, json.loads(texts[0]), texts[1], texts[2]


def test_comparison_shows_runs_side_by_side(tmp_path: Path) -> None:
    figures, page, markdown, html = compare(tmp_path)
    row = next(row for row in page["figures"] if row["name"] == "iw_nll")
    assert [cell["better"] for cell in row["cells"]] == [None, True, True]
    assert row["cells"][2]["difference"]["value"] == pytest.approx(-4, abs=0.3)
    assert figures["headline"]["iw_nll"] == [cell["value"] for cell in row["cells"]]
    assert page["same_documents"]
    assert "larger than its error" in markdown
    assert "Differences are over the same documents" in markdown
    assert html.count("<svg") == len(page["curves"]) + 3
    assert "better" in html
    assert page["paper"] is None


def test_comparison_with_the_literature_labels_each_convention(tmp_path: Path) -> None:
    _, page, markdown, html = compare(tmp_path, paper="ptb")
    rows = page["paper"]["rows"]
    assert rows[0]["ppl"] == 10.28
    assert [row["convention"].split(":")[0] for row in rows] == [
        *["as printed"] * 2,
        *["valid bounds", "the printed convention, on our weights"] * 3,
    ]
    assert rows[3]["ppl"] == WHOLE["paper_convention"]["ppl"]
    for text in (markdown, html):
        assert "58.43" in text
        assert "no bounds" in text


def test_training_means_its_newest_evaluation(tmp_path: Path) -> None:
    run = write_run(tmp_path / "train")
    other = write_evaluation(tmp_path / "train" / "..", 3)
    with pytest.raises(UserError, match=r"a training without an evaluation.*jobs/evaluate\.py"):
        evaluation_of(run)
    record = Artifact.load(other)
    for place, started in (("old", "2026-01-02T01:00:00+00:00"), ("new", STARTED)):
        Artifact(
            **{
                **record.__dict__,
                "folder": Location.parse(tmp_path / "evaluate" / place),
                "inputs": {"weights": Artifact.load(run).fingerprint},
                "started_at": started,
            }
        ).save()
    assert evaluation_of(run).path.endswith("/evaluate/new")
    assert evaluation_of(other) == other


@pytest.mark.parametrize(
    ("count", "spec", "message"),
    [
        (1, {}, "expected 2 to 26"),
        (0, {"paper": "ptb"}, r"runs= names none"),
        (0, {}, "'training' has no value"),
    ],
)
def test_too_few_runs_are_refused(
    tmp_path: Path, count: int, spec: dict[str, Any], message: str
) -> None:
    inputs = {f"runs.{i}": one for i, one in enumerate(write_evaluations(tmp_path, count))}
    with pytest.raises(UserError, match=message):
        run_report(ReportSpec(**spec), inputs, Location.parse(tmp_path / "out"))


def test_runs_that_are_no_evaluations_are_refused(tmp_path: Path) -> None:
    inputs = {"runs.0": write_run(tmp_path), "runs.1": write_evaluation(tmp_path, 0)}
    with pytest.raises(UserError, match="artifact of the stage train: expected evaluations"):
        run_report(ReportSpec(), inputs, Location.parse(tmp_path / "out"))


def test_runs_and_training_together_are_refused(tmp_path: Path) -> None:
    inputs = {"runs.0": write_evaluation(tmp_path, 0), "training": write_run(tmp_path)}
    with pytest.raises(UserError, match="give one of them"):
        run_report(ReportSpec(), inputs, Location.parse(tmp_path / "out"))


def test_damaged_document_table_is_refused(tmp_path: Path) -> None:
    runs = write_evaluations(tmp_path, 2)
    (runs[1] / "documents.parquet").write_bytes(b"PAR1")
    inputs = {f"runs.{i}": one for i, one in enumerate(runs)}
    with pytest.raises(UserError, match=r"documents\.parquet should hold.*evaluate the weights"):
        run_report(ReportSpec(), inputs, Location.parse(tmp_path / "out"))
