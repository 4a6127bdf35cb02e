"""What the report stage does: one page of one training run and its evaluation."""

from __future__ import annotations

from pipeline.specs.base import Spec


class ReportSpec(Spec):
    """One page. Its inputs are a training artifact and the evaluations of its weights."""

    title: str = "DELLA"
