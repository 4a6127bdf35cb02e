"""The page over several studies: each system's difference on each corpus, as its study has it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.runner import Input, plan, run_stage
from pipeline.specs import ReportSpec
from pipeline.storage import Location
from tests.pipeline.test_report import Page
from tests.pipeline.test_report_study import INFORMATION, NAMES, SHIFTS, write_system

SHORTER = ("plain", "plain", "live", "alone")


def write_study(
    folder: Path,
    title: str,
    names: tuple[str, ...] = NAMES,
    against: tuple[str, ...] | None = None,
    **differing: Any,
) -> Location:
    """The page of a study of its own, made by the stage."""
    runs = [write_system(folder / title, i, SHIFTS[i], **differing) for i in range(len(names))]
    spec = ReportSpec(title=title, names=names, against=against)
    return made(folder, spec, runs=runs)


def made(folder: Path, spec: ReportSpec, **inputs: list[Location]) -> Location:
    """The folder of the page that the stage makes of these artifacts."""
    given = {name: [Input.of_folder(name, one) for one in all_] for name, all_ in inputs.items()}
    return run_stage(plan("report", spec, given, Location.parse(folder / "storage"))).folder


def of_two(folder: Path) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """Where the page over two studies lies, its content, and that of the two."""
    both = ("live", "plain")
    studies = [
        write_study(folder, "COCO", against=both),
        write_study(folder, "PTB", SHORTER, against=both[::-1], dropout=0.2),
    ]
    page = made(folder, ReportSpec(title="Both"), studies=studies)
    contents = [(one / "report.json").read_json() for one in (page, *studies)]
    return Path(str(page)), contents[0], contents[1:]


def test_studies_show_each_difference_as_its_study_has_it(tmp_path: Path) -> None:
    folder, page, studies = of_two(tmp_path)
    assert page["against"] == ["live", "plain"]
    assert [study["title"] for study in page["studies"]] == ["COCO", "PTB"]
    assert [row["name"] for row in page["systems"]] == ["plain", "live", "worse", "alone"]
    for row in page["systems"]:
        for found, study in zip(row["on"], studies, strict=True):
            theirs = {one["name"]: one for one in study["systems"]}.get(row["name"])
            assert (found is None) == (theirs is None)
            for base, difference in found["differences"].items() if found else ():
                assert difference.items() >= theirs["differences"][base].items()
    live = page["systems"][1]["on"][0]["differences"]["plain"]
    assert live["percent_error"] / live["error"] == pytest.approx(live["percent"] / live["value"])
    record = json.loads((folder / "artifact.json").read_text())
    assert record["figures"]["headline"]["plain"]["live"] == {
        study["title"]: study["systems"][1]["differences"]["plain"]["percent"] for study in studies
    }


def test_studies_are_shown_as_a_table_and_pictures(tmp_path: Path) -> None:
    folder, page, _ = of_two(tmp_path)
    html, markdown = ((folder / f"report.{form}").read_text() for form in ("html", "md"))
    assert not Page(html).open
    assert html.count("<svg") == 2  # one a base
    worse = [line for line in markdown.splitlines() if line.startswith("| worse ")][-1]
    first, percent, latents, *second = (cell.strip() for cell in worse.strip("|").split("|")[1:])
    difference = page["systems"][2]["on"][0]["differences"]["plain"]
    assert first.startswith("**")  # larger than its error
    assert float(percent) == pytest.approx(difference["percent"], abs=0.005)
    assert latents.endswith(f", {INFORMATION[4]:.2f}")
    assert second == ["–", "–", "–"]  # the system is not in the second
    picture = (folder / "costs.svg").read_text()
    assert all(word in picture for word in ("COCO", "PTB", "worse", "alone"))


def test_studies_show_information_just_below_zero_without_a_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{write_system.__module__}.INFORMATION", (None, None, -0.001))
    studies = [write_study(tmp_path, title, NAMES[:3]) for title in "AB"]
    folder = Path(str(made(tmp_path, ReportSpec(), studies=studies)))
    for form in ("html", "md"):
        text = (folder / f"report.{form}").read_text()
        assert ", 0.00" in text
        assert "-0.00" not in text


def test_studies_picture_may_name_a_system_in_any_letters(tmp_path: Path) -> None:
    names = ('"plain" & <b>', "live")
    studies = [write_study(tmp_path, title, names) for title in "AB"]
    folder = Path(str(made(tmp_path, ReportSpec(), studies=studies)))
    assert not Page((folder / "report.html").read_text()).open
    picture = ET.fromstring((folder / "costs.svg").read_text())
    assert picture.get("aria-label") == f"IW-NLL against {names[0]}"


def test_studies_picture_holds_its_label_beside_long_names(tmp_path: Path) -> None:
    names = ("plain", "layerwise with an autoencoder start")
    studies = [write_study(tmp_path, title, names) for title in "AB"]
    folder = Path(str(made(tmp_path, ReportSpec(), studies=studies)))
    picture = ET.fromstring((folder / "costs.svg").read_text())
    label = next(text for text in picture.iter() if "percent" in (text.text or ""))
    assert "text-anchor: middle" in label.attrib["style"]
    width = float(picture.attrib["viewBox"].split()[2])
    assert float(label.attrib["x"]) == pytest.approx(width / 2)


def test_studies_say_what_a_system_has_set_otherwise(tmp_path: Path) -> None:
    folders = [
        write_study(tmp_path, "A", ("plain", "live")),
        write_study(tmp_path, "B", ("plain", "plain", "live")),
    ]
    page = (made(tmp_path, ReportSpec(), studies=folders) / "report.json").read_json()
    assert {row["name"]: row["settings"] for row in page["systems"]} == {
        "plain": [],
        "live": ["model.latents"],  # A has none, as its plain: the second of the systems
    }


def test_studies_that_cannot_stand_side_by_side_are_refused(tmp_path: Path) -> None:
    one, same = write_study(tmp_path, "A"), write_study(tmp_path / "again", "A")
    other = write_study(tmp_path, "B", against=("worse",))
    with pytest.raises(UserError, match=r"no one system .* \(A with plain; B with worse\)"):
        made(tmp_path, ReportSpec(), studies=[one, other])
    with pytest.raises(UserError, match="two pages with the title 'A'"):
        made(tmp_path, ReportSpec(), studies=[one, same])
    with pytest.raises(UserError, match="studies names one page"):
        made(tmp_path, ReportSpec(), studies=[one])
    run = write_system(tmp_path / "run", 0, 0.0)
    with pytest.raises(UserError, match="the artifact of the stage evaluate: expected pages"):
        made(tmp_path, ReportSpec(), studies=[one, run])
    compared = made(tmp_path, ReportSpec(), runs=[run, write_system(tmp_path / "run", 1, 0.0)])
    with pytest.raises(UserError, match="the page of a comparison: expected pages of studies"):
        made(tmp_path, ReportSpec(), studies=[one, compared])
    with pytest.raises(UserError, match="but runs= was given"):
        made(tmp_path, ReportSpec(), studies=[one, other], runs=[run])
    with pytest.raises(UserError, match="but names= was given"):
        made(tmp_path, ReportSpec(names=("a",)), studies=[one, other])
