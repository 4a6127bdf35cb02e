"""Look a cluster over before its first run: a line a check, and what to do about each that is red.

python jobs/doctor.py train.num_workers=4 model=gpt2 deepspeed=zero2 storage=/shared/runs
python jobs/doctor.py dataset=FOLDER cluster.address=auto
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

# A script's own folder is on the path, its parent is not: exchange them.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.entry import Config, run_job, spec_values  # noqa: E402
from pipeline.cluster import refuse_storage_that_vanishes  # noqa: E402
from pipeline.doctor.checkup import run_doctor  # noqa: E402
from pipeline.secrets import redacted  # noqa: E402
from pipeline.specs.doctor import DoctorSpec  # noqa: E402
from pipeline.storage import Location  # noqa: E402


def main(config: Config) -> None:
    """Build the spec, make the checks; exit with 2 where one of them is red."""
    spec = DoctorSpec.build(spec_values(config, DoctorSpec), "doctor")
    storage = Location.parse(config["storage"])
    refuse_storage_that_vanishes(storage)
    dataset = Location.parse(config["dataset"]) if config["dataset"] is not None else None
    output = storage / "doctor" / time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    checks = run_doctor(spec, dataset, output)
    if (output / "doctor.json").is_file():
        print(redacted(f"artifact: {output}"), flush=True)
    if any(check.state == "wrong" for check in checks):
        sys.exit(2)


if __name__ == "__main__":
    run_job("doctor", main)
