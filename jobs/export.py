"""Make weights of a training checkpoint: one `from_pretrained` folder, without a GPU.

python jobs/export.py checkpoint=RUN/checkpoints/step-000000500 storage=DIR
python jobs/export.py checkpoint=RUN which=best storage=DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

# A script's own folder is on the path, its parent is not: exchange them.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.entry import Config, ensure, run_job, spec_values  # noqa: E402
from pipeline.specs.export import ExportSpec  # noqa: E402
from pipeline.storage import Location  # noqa: E402
from pipeline.training.finding import find_checkpoint  # noqa: E402


def main(config: Config) -> None:
    """Find the checkpoint, which a run that is not done may have as well, and run the stage."""
    spec = ExportSpec.build(spec_values(config, ExportSpec), "export")
    checkpoint = find_checkpoint(Location.parse(config["checkpoint"]), spec.which)
    ensure("export", spec, {"checkpoint": str(checkpoint)}, config["storage"])


if __name__ == "__main__":
    run_job("export", main)
