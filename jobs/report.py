"""Make the page of a training run and its evaluation.

python jobs/report.py training=FOLDER figures=FOLDER storage=DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

# A script's own folder is on the path, its parent is not: exchange them.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.entry import Config, ensure, run_job, spec_values  # noqa: E402
from pipeline.specs import ReportSpec  # noqa: E402


def main(config: Config) -> None:
    """Build the spec and run the stage."""
    spec = ReportSpec.build(spec_values(config, ReportSpec), "report")
    ensure(
        "report",
        spec,
        {name: config[name] for name in ("training", "figures", "runs")},
        config["storage"],
    )


if __name__ == "__main__":
    run_job("report", main)
