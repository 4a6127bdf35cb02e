"""What the report stage does: the page of one run, or several runs side by side."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from pipeline.errors import nearest
from pipeline.specs.base import Spec


class ReportSpec(Spec):
    """One page. Its inputs are a training and its evaluation, or the evaluations to compare."""

    title: str = "DELLA"
    # Of each of the runs, which system it is; those of one name are its seeds. For a study's page.
    names: tuple[str, ...] | None = None
    # Of a study's page: the systems that each is compared with; by default the first of names.
    against: tuple[str, ...] | None = None
    # Runs beside what the literature reports on this corpus.
    paper: Literal["yelp", "yahoo", "ptb", "snli"] | None = None

    @model_validator(mode="after")
    def _against_names_systems(self) -> Self:
        if self.against is None:
            return self
        if self.names is None:
            raise ValueError(
                "against is of a study's page, but names is not given: give the system of each "
                "run, or leave against out"
            )
        if not self.against:
            raise ValueError("against is empty: expected systems that the others are compared with")
        known = list(dict.fromkeys(self.names))
        for name in self.against:
            if name not in known:
                raise ValueError(
                    f"against has '{name}', which is no system of the page{nearest(name, known)}: "
                    f"expected some of {'; '.join(known)}"
                )
        return self
