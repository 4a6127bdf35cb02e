"""A study's page: systems with their seeds, differences over the same documents, and the front."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.artifact import Artifact
from pipeline.errors import UserError
from pipeline.report.pairing import DocumentTable
from pipeline.specs import ReportSpec
from pipeline.stages.report import run_report
from pipeline.storage import Location
from tests.pipeline.test_report import Page
from tests.pipeline.test_report_comparison import STARTED, write_evaluation

NAMES = ("plain", "plain", "live", "live", "worse")
SHIFTS = (0.0, 0.2, -0.5, -0.7, 3.0)
INFORMATION = (None, None, 5.0, 6.0, 4.0)


def write_system(folder: Path, index: int, shift: float, **differing: Any) -> Location:
    """An evaluation of the weights of a training of its own."""
    evaluation = Artifact.load(write_evaluation(folder, index, shift))
    model = {"latents": "none" if INFORMATION[index] is None else "layerwise"}
    training = Artifact(
        Location.parse(folder / "train" / str(index)), "train", f"{index + 50:064x}",
        {"model": model, "train": {"seed": index} | differing}, {}, "done", STARTED,
        figures={"num_parameters": 1000 + index, "tokens_per_s": 50.0, "peak_memory_bytes": 2**21},
    ).save()  # fmt: skip
    figures = evaluation.figures | {"mutual_information": INFORMATION[index]}
    replace(evaluation, figures=figures, input_folders={"weights": str(training.folder)}).save()
    return evaluation.folder


def study(
    folder: Path,
    names: tuple[str, ...] = NAMES,
    shifts: tuple[float, ...] = SHIFTS,
    against: tuple[str, ...] | None = None,
) -> tuple[Any, dict[str, Any]]:
    inputs = {f"runs.{i}": write_system(folder, i, shift) for i, shift in enumerate(shifts)}
    spec = ReportSpec(names=names, against=against)
    figures = run_report(spec, inputs, Location.parse(folder / "out"))
    return figures, json.loads((folder / "out" / "report.json").read_text())


def test_study_gives_means_errors_and_the_spread_over_seeds(tmp_path: Path) -> None:
    figures, page = study(tmp_path)
    runs = [Artifact.load(Location.parse(tmp_path / "evaluate" / f"e{i}d")) for i in range(5)]
    values = [run.figures["iw_nll"] for run in runs]
    assert [(row["name"], row["seeds"]) for row in page["systems"]] == [
        ("plain", 2), ("live", 2), ("worse", 1),
    ]  # fmt: skip
    cell = page["systems"][1]["cells"]["iw_nll"]
    errors = [run.figures["standard_errors"]["iw_nll"] for run in runs[2:4]]
    assert cell["value"] == pytest.approx(np.mean(values[2:4]))
    assert cell["spread"] == pytest.approx(np.std(values[2:4], ddof=1))
    assert cell["error"] == pytest.approx(np.mean(errors))
    assert page["systems"][2]["cells"]["iw_nll"]["spread"] is None
    assert page["systems"][0]["cells"]["num_parameters"]["value"] == 1000.5
    assert page["systems"][0]["cells"]["peak_memory"]["value"] == 2
    assert page["systems"][1]["settings"] == {"model.latents": "layerwise"}
    assert figures["headline"]["iw_nll"]["live"] == cell["value"]


def test_study_differences_are_of_documents_and_of_means_over_seeds(tmp_path: Path) -> None:
    _, page = study(tmp_path)
    tables = [
        DocumentTable.of(Artifact.load(Location.parse(tmp_path / "evaluate" / f"e{i}d")))
        for i in range(4)
    ]
    columns = [table.columns["iw_nll"] for table in tables]
    deviations = (columns[2] + columns[3] - columns[0] - columns[1]) / 2
    found = page["systems"][1]["differences"]["plain"]
    assert found["value"] == pytest.approx(deviations.mean())
    assert found["error"] == pytest.approx(deviations.std(ddof=1) / len(deviations) ** 0.5)
    assert found["percent"] == pytest.approx(
        200 * deviations.mean() / (columns[0] + columns[1]).mean()
    )
    means = [column.mean() for column in columns]
    spread = np.hypot(np.std(means[:2], ddof=1), np.std(means[2:], ddof=1))
    assert found["spread"] == pytest.approx(spread)
    of_both = np.hypot(found["error"], spread / 2**0.5)
    assert abs(found["value"]) > 2 * of_both
    assert found["larger"]
    assert page["systems"][0]["differences"] == {}
    assert page["systems"][2]["differences"]["plain"]["spread"] is None  # one seed
    assert page["same_documents"]


def test_study_difference_that_seeds_disagree_on_is_not_larger_than_its_error(
    tmp_path: Path,
) -> None:
    _, page = study(tmp_path, shifts=(0.0, 0.2, -3.0, 1.8, 3.0))
    found = page["systems"][1]["differences"]["plain"]
    assert abs(found["value"]) > 2 * found["error"]  # of documents alone it would be
    assert not found["larger"]


def test_study_system_of_one_seed_is_held_to_spread_as_the_other(tmp_path: Path) -> None:
    _, page = study(tmp_path, shifts=(-1.0, 1.2, -0.5, -0.7, 3.0))
    found = page["systems"][2]["differences"]["plain"]
    evaluations = (tmp_path / "evaluate" / f"e{i}d" for i in range(2))
    tables = [DocumentTable.of(Artifact.load(Location.parse(one))) for one in evaluations]
    spread = np.std([table.columns["iw_nll"].mean() for table in tables], ddof=1)
    of_the_mean = 2 * np.hypot(found["error"], spread / 2**0.5)
    assert of_the_mean < abs(found["value"]) < 2 * np.hypot(found["error"], spread * 1.5**0.5)
    assert not found["larger"]
    assert found["spread"] is None


def test_study_compares_with_each_system_that_it_is_told_to(tmp_path: Path) -> None:
    _, page = study(tmp_path, against=("live", "plain"))
    plain, live, worse = page["systems"]
    assert page["against"] == ["live", "plain"]
    assert plain["differences"]["live"]["value"] == -live["differences"]["plain"]["value"]
    of_both = [worse["differences"][base]["value"] for base in ("plain", "live")]
    assert of_both[1] == pytest.approx(of_both[0] - live["differences"]["plain"]["value"])
    html, markdown = ((tmp_path / "out" / f"report.{form}").read_text() for form in ("html", "md"))
    for shown in (html, markdown):
        assert shown.index("Against live") < shown.index("Against plain")
    assert "| worse | " in markdown[: markdown.index("## Against plain")]


def test_study_against_what_is_not_on_the_page_is_refused_before_anything_runs() -> None:
    with pytest.raises(UserError, match=r"has 'plian', .*did you mean 'plain'\?\): expected some"):
        ReportSpec.build({"names": ["plain", "plain", "della"], "against": ["plian"]})
    with pytest.raises(UserError, match="names is not given"):
        ReportSpec.build({"against": ["plain"]})
    with pytest.raises(UserError, match="against is empty"):
        ReportSpec.build({"names": ["plain"], "against": []})


def test_study_front_is_what_no_other_system_beats_in_both(tmp_path: Path) -> None:
    _, page = study(tmp_path)
    assert [row["on_front"] for row in page["systems"]] == [False, True, False]


def test_study_page_shows_all_systems_and_its_picture_stands_alone(tmp_path: Path) -> None:
    study(tmp_path)
    html = (tmp_path / "out" / "report.html").read_text()
    page, markdown = Page(html), (tmp_path / "out" / "report.md").read_text()
    assert not page.open
    assert html.count("<svg") == 1
    for shown in (html, markdown):
        assert all(name in shown for name in NAMES)
        assert "live" in shown
    assert "![IW-NLL against MI](front.svg)" in markdown
    tree = ET.fromstring((tmp_path / "out" / "front.svg").read_text())
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    words = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert set(NAMES) <= set(words)


def test_study_of_one_name_for_two_systems_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'same' differ in model\.latents: expected seeds"):
        study(tmp_path, ("plain", "same", "same", "live", "worse"))


def test_study_without_a_name_for_each_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names has 2 entries and runs 5"):
        study(tmp_path, ("a", "b"))
    with pytest.raises(UserError, match="leave paper= out"):
        run_report(ReportSpec(names=("a",)), {}, Location.parse(tmp_path / "out"))
