"""Run the stages of a job spec, each skipped when it is done already.

    python jobs/run.py job=demo
    python jobs/run.py job=ptb action=plan corpus.train=../data/ptb/train.txt

Keys that start with a stage's name set that stage's config: `model.train.max_steps=100`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# A script's own folder is on the path, its parent is not: exchange them.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.entry import Config, run_job  # noqa: E402
from jobs.job_file import job_from_config, split_stage_overrides  # noqa: E402
from jobs.job_table import print_plan, print_status, run_all  # noqa: E402
from pipeline.cluster import refuse_storage_that_vanishes  # noqa: E402
from pipeline.errors import UserError, nearest  # noqa: E402
from pipeline.storage import Location  # noqa: E402

ACTIONS = {"run": run_all, "plan": print_plan, "status": print_status}


def main(config: Config) -> None:
    """Build the job spec and do what `action` says."""
    action = config["action"]
    if action not in ACTIONS:
        raise UserError(
            f"action={action} is not one of {', '.join(ACTIONS)}{nearest(str(action), ACTIONS)}."
        )
    storage = Location.parse(config["storage"])
    refuse_storage_that_vanishes(storage)
    ACTIONS[action](job_from_config(config), storage)


if __name__ == "__main__":
    run_job("run", main, expand=split_stage_overrides)
