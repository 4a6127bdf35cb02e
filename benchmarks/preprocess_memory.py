"""Does preprocess's memory grow with its corpus? Peak memory at several sizes of one text.

python benchmarks/preprocess_memory.py --text FILE --vocab-size 8000 --growth 1,10

The corpus is the text repeated, in a temporary file. Peaks are those of the proportional set size
(memory that processes share counts once), taken every quarter of a second: of the driver, of the
largest worker, and of all processes of the run together, Ray's own among them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
_EVERY_S = 0.25


@dataclass
class Peak:
    """Bytes at most."""

    driver: int = 0
    worker: int = 0
    everything: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="a document a line")
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--growth", default="1,10", help="how many times the text is repeated")
    parser.add_argument("--cpus", type=int, default=2)
    options = parser.parse_args()
    table = Table("corpus", "MB", "driver", "largest worker", "all processes", "took")
    first: Peak | None = None
    for times in map(int, options.growth.split(",")):
        peak, size, took = measure(options.text, times, options.vocab_size, options.cpus)
        first = first or peak
        cells = [
            f"{value / 1e6:,.0f} MB ({value / base:.2f} x)"
            for value, base in (
                (peak.driver, first.driver),
                (peak.worker, first.worker),
                (peak.everything, first.everything),
            )
        ]
        table.add_row(f"{times} x", f"{size / 1e6:,.1f}", *cells, f"{took:,.0f} s")
    Console().print(table)


def measure(text: Path, times: int, vocab_size: int, cpus: int) -> tuple[Peak, int, float]:
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus.txt"
        content = text.read_bytes()
        content += b"" if content.endswith(b"\n") else b"\n"
        with corpus.open("wb") as file:
            for _ in range(times):
                file.write(content)
        command = [
            sys.executable, "jobs/preprocess.py", "corpus=text", f"corpus.train={corpus}",
            "corpus.max_rejected=1", "tokenizer=bpe", f"tokenizer.vocab_size={vocab_size}",
            f"cluster.num_cpus={cpus}", f"storage={scratch}/runs",
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        started = time.monotonic()
        driver = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        peak = watch(driver)
        if driver.returncode:
            assert driver.stderr is not None
            sys.exit(driver.stderr.read().decode())
        return peak, corpus.stat().st_size, time.monotonic() - started


def watch(driver: subprocess.Popen[bytes]) -> Peak:
    peak = Peak()
    process = psutil.Process(driver.pid)
    while driver.poll() is None:
        try:
            family = [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        held = {one: proportional(one) for one in family}
        workers = [held[one] for one in family if is_worker(one)]
        peak.driver = max(peak.driver, held[process])
        peak.worker = max(peak.worker, *workers, 0)
        peak.everything = max(peak.everything, sum(held.values()))
        time.sleep(_EVERY_S)
    driver.wait()
    return peak


def proportional(process: psutil.Process) -> int:
    try:
        size: int = process.memory_full_info().pss
    except psutil.Error:
        return 0
    return size


def is_worker(process: psutil.Process) -> bool:
    try:
        return "UnitWriter" in " ".join(process.cmdline())
    except psutil.Error:
        return False


if __name__ == "__main__":
    main()
