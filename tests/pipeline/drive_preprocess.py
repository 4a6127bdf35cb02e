"""A driver of its own process, for tests that kill it or give it other CPUs.

python -m tests.pipeline.drive_preprocess SPEC.json FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.specs import PreprocessSpec
from pipeline.stages.preprocess import run_preprocess
from pipeline.storage import Location

if __name__ == "__main__":
    spec = PreprocessSpec.model_validate_json(Path(sys.argv[1]).read_text())
    run_preprocess(spec, {}, Location.parse(sys.argv[2]))
