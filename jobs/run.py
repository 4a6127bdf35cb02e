"""Run the stages of a job, each skipped when it is done already.

    python jobs/run.py job=demo
    python jobs/run.py job=ptb action=plan folder=../data/ptb
    python jobs/run.py job=MY.yaml action=status

Actions: run, plan, status, logs, cancel, render. `from=STAGE`, `only=A,B` and `force=A,B` choose
stages. Keys that start with a stage's name set that stage's config: `model.train.max_steps=100`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# A script's own folder is on the path, its parent is not: exchange them.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.entry import Config, run_job  # noqa: E402
from jobs.job_actions import ACTIONS, render  # noqa: E402
from jobs.job_file import expand_arguments, file_of_arguments, job_from_config  # noqa: E402
from pipeline.chain.driver import Selection  # noqa: E402
from pipeline.cluster import refuse_storage_that_vanishes  # noqa: E402
from pipeline.errors import UserError, nearest  # noqa: E402
from pipeline.secrets import has_credentials, redacted  # noqa: E402
from pipeline.specs.render import RenderSpec  # noqa: E402
from pipeline.storage import Location  # noqa: E402


def main(config: Config) -> None:
    """Build the job spec and do what `action` says."""
    action, actions = config["action"], [*ACTIONS, "render"]
    if action not in actions:
        raise UserError(
            f"action={action} is not one of {', '.join(actions)}{nearest(str(action), actions)}."
        )
    if has_credentials(str(config["storage"])):
        raise UserError(
            f"storage={redacted(config['storage'])} holds a key: the stages run in processes of "
            "their own, and Ray shows a job's command to all who see its dashboard; give keys in "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or as your storage's own client reads "
            "them, on every node."
        )
    selection = Selection(config["from"], config["only"], config["force"])
    job = job_from_config(config, file_of_arguments(sys.argv[1:]))
    if action == "render":
        selection.chosen(job)
        spec = RenderSpec.build(config["render"], "render")
        render(job, config["storage"], spec, sys.argv[1:])
        return
    storage = Location.parse(config["storage"])
    refuse_storage_that_vanishes(storage)
    ACTIONS[action](job, storage, selection)


if __name__ == "__main__":
    run_job("run", main, expand=expand_arguments)
