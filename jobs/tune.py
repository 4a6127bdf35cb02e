"""Search hyperparameters: real training runs under Ray Tune.

python jobs/tune.py dataset=FOLDER search=default num_trials=4 storage=DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

# A script's own folder is on the path, its parent is not: exchange them.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.entry import Config, build_spec, ensure, run_job  # noqa: E402
from pipeline.specs import TuneSpec  # noqa: E402


def main(config: Config) -> None:
    """Build the spec and run the stage."""
    spec = build_spec(TuneSpec, config, "tune")
    ensure("tune", spec, {"dataset": config["dataset"]}, config["storage"])


if __name__ == "__main__":
    run_job("tune", main)
