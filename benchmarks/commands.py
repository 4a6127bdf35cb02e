"""The pipeline's commands, as benchmarks of whole commands run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_job(job: str, *arguments: str) -> str:
    """Run `jobs/<job>.py`; return the folder that it prints last. Leaves where it fails."""
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / f"{job}.py", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        sys.exit(f"{job} {' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout.strip().splitlines()[-1].removeprefix("artifact: ")
