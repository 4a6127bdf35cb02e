"""How long do `action=plan` and `action=status` take on a job of 20 stages that are done?

    python benchmarks/plan_time.py

One preprocess, nineteen trainings of its dataset; their records are written as a run would leave
them. Each time is that of a whole command, from its start to its exit; medians.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from jobs.entry import compose  # noqa: E402
from jobs.job_file import expand_arguments, job_from_config  # noqa: E402
from pipeline.artifact import Artifact, now  # noqa: E402
from pipeline.runner import Planned  # noqa: E402
from pipeline.storage import Location  # noqa: E402

TARGET_S = 2.0
DATA = """name: many
stages:
  data: {{run: preprocess, corpus: text, corpus.train: {corpus}, tokenizer: bpe}}
"""
MODEL = """  model{seed}:
    {{run: train, dataset: "${{stage:data}}", train.max_steps: 100, train.seed: {seed}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        arguments = write_job(folder, options.stages)
        table = Table("action", "median", "worst", "at most", title=f"{options.stages} stages")
        for action in ("plan", "status"):
            times = [timed([*arguments, f"action={action}"]) for _ in range(options.repeats)]
            median, worst = statistics.median(times), max(times)
            table.add_row(action, f"{median:.2f} s", f"{worst:.2f} s", f"{TARGET_S:.0f} s")
    Console().print(table)


def write_job(folder: Path, stages: int) -> list[str]:
    """The job's file, and the records of all its stages."""
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"line number {i}\n" for i in range(1000)))
    models = "".join(MODEL.format(seed=seed) for seed in range(stages - 1))
    file = folder / "many.yaml"
    file.write_text(DATA.format(corpus=corpus) + models)
    arguments = [f"job={file}", f"storage={folder / 'runs'}"]
    job = job_from_config(compose("run", expand_arguments(arguments)), file)
    for stage, found in job.plan(Location.parse(folder / "runs")):
        assert isinstance(found, Planned)
        Artifact(
            found.output, stage.kind, found.fingerprint, found.spec.model_dump(mode="json"),
            found.input_fingerprints, "done", now(), took_s=1.0, job=job.name, name=stage.name,
        ).save()  # fmt: skip
    return arguments


def timed(arguments: list[str]) -> float:
    """Seconds of one command."""
    started = time.monotonic()
    subprocess.run(
        [sys.executable, ROOT / "jobs" / "run.py", *arguments], check=True, capture_output=True
    )
    return time.monotonic() - started


if __name__ == "__main__":
    main()
