"""Make the page of a training run and its evaluation, of several runs, or of several studies.

python jobs/report.py training=FOLDER figures=FOLDER storage=DIR
python jobs/report.py runs=[A,B,C] storage=DIR
python jobs/report.py paper=ptb runs=[A] storage=DIR
python jobs/report.py studies=[A,B,C] storage=DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

# A script's own folder is on the path, its parent is not: exchange them.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.entry import Config, ensure, run_job, spec_values  # noqa: E402
from pipeline.report.finding import evaluation_of  # noqa: E402
from pipeline.specs import ReportSpec  # noqa: E402
from pipeline.storage import Location  # noqa: E402


def main(config: Config) -> None:
    """Build the spec and run the stage."""
    spec = ReportSpec.build(spec_values(config, ReportSpec), "report")
    runs = config["runs"]
    if runs is not None:  # named before the plan: which evaluations they are is what is compared
        runs = [str(evaluation_of(Location.parse(folder))) for folder in runs]
    ensure(
        "report",
        spec,
        {key: config[key] for key in ("training", "figures", "studies")} | {"runs": runs},
        config["storage"],
    )


if __name__ == "__main__":
    run_job("report", main)
