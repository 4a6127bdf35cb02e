"""What the report stage does: the page of one run, or several runs side by side."""

from __future__ import annotations

from typing import Literal

from pipeline.specs.base import Spec


class ReportSpec(Spec):
    """One page. Its inputs are a training and its evaluation, or the evaluations to compare."""

    title: str = "DELLA"
    # Of each of the runs, which system it is; those of one name are its seeds. For a study's page.
    names: tuple[str, ...] | None = None
    # Runs beside what the literature reports on this corpus.
    paper: Literal["yelp", "yahoo", "ptb", "snli"] | None = None
