"""The report stage: the page of a training run and of the evaluation of its weights."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from pipeline.artifact import Artifact
from pipeline.errors import UserError
from pipeline.report.page import build_page
from pipeline.report.render import as_html, as_markdown
from pipeline.specs import ReportSpec
from pipeline.storage import Location

HTML, MARKDOWN, JSON = "report.html", "report.md", "report.json"


def run_report(spec: ReportSpec, inputs: dict[str, Location], output: Location) -> dict[str, Any]:
    """Write the page of `inputs["training"]` and, when it is there, of `inputs["figures"]`.

    Writes `report.html` (self-contained, no network), and the same content as `report.md` and
    `report.json`.

    Returns:
        The headline figures of the page, by name, and whether the latents are collapsed.

    Raises:
        UserError: if an input is no artifact of its stage, or they are not of the same weights.
    """
    if "training" not in inputs:
        raise UserError("report: 'training' has no value, but it is needed; set training=...")
    training = Artifact.load(inputs["training"])
    figures = Artifact.load(inputs["figures"]) if "figures" in inputs else None
    page = build_page(spec.title, training, figures)
    (output / JSON).write_json(page)
    (output / MARKDOWN).write_bytes(as_markdown(page).encode())
    (output / HTML).write_bytes(as_html(page).encode())
    Console().print(f"report: {output / HTML}", soft_wrap=True, highlight=False, markup=False)
    verdict = page["verdict"]
    return {
        "headline": {figure["name"]: figure["value"] for figure in page["headline"]},
        "collapsed": verdict["collapsed"] if verdict else None,
        "page": HTML,
    }
