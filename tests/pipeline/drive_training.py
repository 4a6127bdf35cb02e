"""A training driver in a process of its own: python drive_training.py SPEC_JSON DATASET OUTPUT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.specs import TrainSpec
from pipeline.stages.train import run_train
from pipeline.storage import Location

if __name__ == "__main__":
    spec, dataset, output = sys.argv[1:]
    run_train(
        TrainSpec.build(json.loads(spec)),
        {"dataset": Location.parse(dataset)},
        Location.parse(output),
    )
