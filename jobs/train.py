"""Train a DELLA on a dataset that `jobs/preprocess.py` made.

    python jobs/train.py dataset=FOLDER model=tiny train.max_steps=200 train.num_workers=2 \\
        deepspeed=zero2 storage=DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

# A script's own folder is on the path, its parent is not: exchange them.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.entry import Config, ensure, run_job, spec_values, trial_overrides  # noqa: E402
from pipeline.specs import TrainSpec  # noqa: E402


def main(config: Config) -> None:
    """Build the spec and run the stage."""
    spec = TrainSpec.build(spec_values(config, TrainSpec), "train")
    ensure("train", spec, {"dataset": config["dataset"]}, config["storage"])


def with_trial(arguments: list[str]) -> list[str]:
    """Put the settings of `from_trial=FOLDER_OR_FILE` before the command line's own, which win."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "from_trial" and value:
            return trial_overrides(value) + arguments
    return arguments


if __name__ == "__main__":
    run_job("train", main, expand=with_trial)
