"""The report stage: the page of a run, of several runs, of a study, or of several studies."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from pipeline.artifact import Artifact, listed
from pipeline.errors import UserError
from pipeline.report.comparison import build_comparison
from pipeline.report.costs import costs_panel
from pipeline.report.front import front_panel
from pipeline.report.page import build_page
from pipeline.report.plots import standalone
from pipeline.report.render import as_html, as_markdown
from pipeline.report.studies import build_studies
from pipeline.report.study import build_study
from pipeline.specs import ReportSpec
from pipeline.storage import Location

HTML, MARKDOWN, JSON = "report.html", "report.md", "report.json"
FRONT, COSTS = "front.svg", "costs.svg"


def run_report(spec: ReportSpec, inputs: dict[str, Location], output: Location) -> dict[str, Any]:
    """Write the page of `inputs["training"]` and its `figures`, of the evaluations `runs`, or of
    the study pages `studies`.

    Writes `report.html` (self-contained, no network), and the same content as `report.md` and
    `report.json`; of a study also `front.svg`, its picture, and of several `costs.svg`.

    Returns:
        The headline figures of the page, by name, and whether the latents are collapsed; of a
        comparison, a list of them; of a study, each by system; of several, the IW-NLL less that
        of another system in percent, by that one, system and study.

    Raises:
        UserError: if an input is no artifact of its stage, or they do not belong together.
    """
    runs = [Artifact.load(folder) for folder in listed(inputs, "runs")]
    studies = listed(inputs, "studies")
    _check_inputs(spec, inputs, runs)
    if studies:
        page = build_studies(spec.title, studies, [_page_of(folder) for folder in studies])
        picture = costs_panel(page, page["against"][0])
        (output / COSTS).write_bytes(standalone(picture).encode())
        figures = _studies_figures(page)
    elif spec.names is not None:
        page = build_study(spec.title, spec.names, runs, spec.against)
        (output / FRONT).write_bytes(standalone(front_panel(page["systems"])).encode())
        figures = _study_figures(page)
    elif runs:
        page = build_comparison(spec.title, runs, spec.paper)
        figures = _comparison_figures(page)
    else:
        training = Artifact.load(inputs["training"])
        evaluation = Artifact.load(inputs["figures"]) if "figures" in inputs else None
        page = build_page(spec.title, training, evaluation)
        verdict = page["verdict"]
        figures = {
            "headline": {figure["name"]: figure["value"] for figure in page["headline"]},
            "collapsed": verdict["collapsed"] if verdict else None,
        }
    (output / JSON).write_json(page)
    (output / MARKDOWN).write_bytes(as_markdown(page).encode())
    (output / HTML).write_bytes(as_html(page).encode())
    Console().print(f"report: {output / HTML}", soft_wrap=True, highlight=False, markup=False)
    return figures | {"page": HTML}


def _page_of(folder: Location) -> dict[str, Any]:
    artifact = Artifact.load(folder)
    if artifact.stage != "report":
        raise UserError(
            f"studies holds {folder}, the artifact of the stage {artifact.stage}: expected pages "
            "of studies; give the folders that jobs/report.py, or a job of the study, printed."
        )
    page: dict[str, Any] = (folder / JSON).read_json()
    return page


def _check_inputs(spec: ReportSpec, inputs: dict[str, Location], runs: list[Artifact]) -> None:
    if listed(inputs, "studies"):
        given = {**inputs, "runs": runs or None, "names": spec.names, "paper": spec.paper}
        for name in ("training", "figures", "runs", "names", "paper"):
            if given.get(name) is not None:
                raise UserError(
                    f"report: studies= sets pages of studies side by side, but {name}= was given "
                    "with it, which makes another page: give one of them."
                )
        return
    if runs and ("training" in inputs or "figures" in inputs):
        raise UserError(
            "report: runs= compares several runs and training= shows one, but both were given: "
            "give one of them."
        )
    if spec.names is not None and (spec.paper is not None or not runs):
        raise UserError(
            "report: names= makes a study's page of several runs, without the literature beside "
            "them: give runs=[FOLDER,FOLDER], and leave paper= out."
        )
    if not runs and spec.paper is not None:
        raise UserError(
            f"report: paper={spec.paper} sets evaluations beside the literature, but runs= names "
            "none: give runs=[FOLDER]."
        )
    if not runs and "training" not in inputs:
        raise UserError("report: 'training' has no value, but it is needed; set training=...")


def _study_figures(page: dict[str, Any]) -> dict[str, Any]:
    systems = page["systems"]
    headline = {
        column["name"]: {row["name"]: row["cells"][column["name"]]["value"] for row in systems}
        for column in page["columns"]
    }
    return {"headline": headline, "collapsed": {row["name"]: row["collapsed"] for row in systems}}


def _studies_figures(page: dict[str, Any]) -> dict[str, Any]:
    titles = [study["title"] for study in page["studies"]]
    percent = {
        base: {
            row["name"]: {
                title: found["differences"][base]["percent"]
                for title, found in zip(titles, row["on"], strict=True)
                if found and found["differences"].get(base)
            }
            for row in page["systems"]
            if row["name"] != base
        }
        for base in page["against"]
    }
    return {"headline": percent}


def _comparison_figures(page: dict[str, Any]) -> dict[str, Any]:
    rows = {row["name"]: [cell["value"] for cell in row["cells"]] for row in page["figures"]}
    return {"headline": rows, "collapsed": [run["collapsed"] for run in page["runs"]]}
