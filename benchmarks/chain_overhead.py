"""What does a chain cost over the same commands given by hand?

    python benchmarks/chain_overhead.py

`python jobs/run.py job=demo` against `jobs/preprocess.py`, `jobs/train.py`, `jobs/evaluate.py` and
`jobs/report.py` with the settings of its stages, each into a storage of its own. The two take
turns, beginning with another each round; the figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import yaml
from commands import ROOT, run_job
from rich.console import Console
from rich.table import Table

TARGET = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.KEY=VALUE")
    options = parser.parse_args()
    rounds = []
    for number in range(options.rounds):
        sides = [("chain", chain), ("by hand", by_hand)]
        times = {}
        for name, side in sides if number % 2 == 0 else reversed(sides):
            with tempfile.TemporaryDirectory() as storage:
                started = time.monotonic()
                side(storage, options.set)
                times[name] = time.monotonic() - started
        rounds.append(times)
    table = Table("round", "chain", "by hand", "chain / by hand", title=f"at most {TARGET}")
    for number, times in enumerate(rounds, 1):
        ratio = times["chain"] / times["by hand"]
        table.add_row(str(number), f"{times['chain']:.1f} s", f"{times['by hand']:.1f} s",
                      f"{ratio:.3f}")  # fmt: skip
    Console().print(table)
    ratios = [times["chain"] / times["by hand"] for times in rounds]
    print(f"median ratio {statistics.median(ratios):.3f}")


def chain(storage: str, settings: list[str]) -> None:
    """The job as one command."""
    run_job("run", "job=demo", f"storage={storage}", *settings)


def by_hand(storage: str, settings: list[str]) -> None:
    """Its stages as commands, one after the other."""
    stages: dict[str, dict[str, Any]] = yaml.safe_load(
        (ROOT / "conf" / "job" / "demo.yaml").read_text()
    )["stages"]
    folders: dict[str, str] = {}
    for name, entry in stages.items():
        own = dict(part.removeprefix(f"{name}.").split("=", 1) for part in settings
                   if part.startswith(f"{name}."))  # fmt: skip
        given = {key: value for key, value in entry.items() if key != "run"} | own
        arguments = [f"{key}={resolved(value, folders)}" for key, value in given.items()]
        folders[name] = run_job(entry["run"], *arguments, f"storage={storage}")


def resolved(value: Any, folders: dict[str, str]) -> str:
    """A setting, with `${stage:NAME}` as that stage's folder."""
    text = str(value)
    if text.startswith("${stage:"):
        return folders[text.removeprefix("${stage:").removesuffix("}")]
    return text


if __name__ == "__main__":
    main()
