"""Jobs of light stages for the tests of the graph: each stage is a real page in a process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact, now
from pipeline.chain.job_spec import JobSpec, JobStage, Source, StageReference
from pipeline.specs import ClusterSpec, ReportSpec
from pipeline.specs.job import StageOptions
from pipeline.storage import Location


def finished_run(folder: Path, stage: str = "train") -> Location:
    """The folder of a training that is done; of another stage, a page of it cannot be made."""
    run = Location.parse(folder)
    row = {"kind": "train", "step": 1, "epoch": 0, "loss": 2.0, "kl": 1.0, "kl_per_layer": [1.0]}
    (run / "metrics.jsonl").write_bytes(json.dumps(row).encode() + b"\n")
    spec: dict[str, Any] = {"model": {"size": "tiny"}, "train": {}}
    fingerprint = folder.name.encode().hex().ljust(64, "0")
    Artifact(run, stage, fingerprint, spec, {}, "done", now(), finished_at=now(), took_s=1.0).save()
    return run


def page(name: str, source: Source, title: str | None = None, **options: Any) -> JobStage:
    """A stage that makes the page of a training."""
    spec = ReportSpec(title=title or name)
    return JobStage(
        name,
        "report",
        spec,
        {"training": source},
        options=StageOptions(**options),
        place=f"job.yaml:{len(name)}",
    )


def job_of(*stages: JobStage) -> JobSpec:
    """A job of these stages."""
    return JobSpec.build("j", {stage.name: stage for stage in stages}, ClusterSpec())


def after(name: str) -> StageReference:
    """The output of a stage."""
    return StageReference(name)
