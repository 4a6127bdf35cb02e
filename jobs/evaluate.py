"""Measure trained weights on a split of a dataset.

python jobs/evaluate.py weights=FOLDER dataset=FOLDER split=test storage=DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

# A script's own folder is on the path, its parent is not: exchange them.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.entry import Config, ensure, run_job, spec_values  # noqa: E402
from pipeline.specs import EvaluateSpec  # noqa: E402


def main(config: Config) -> None:
    """Build the spec and run the stage."""
    spec = EvaluateSpec.build(spec_values(config, EvaluateSpec), "evaluate")
    ensure(
        "evaluate",
        spec,
        {"weights": config["weights"], "dataset": config["dataset"]},
        config["storage"],
    )


if __name__ == "__main__":
    run_job("evaluate", main)
