"""What do checkpoints cost training, and what does a death?

    python benchmarks/checkpoints.py

Trains a small model on made-up text under Ray Train, without a kill and with the kill of a worker
and of the driver. Prints how long checkpoints kept training waiting, the time from a kill to the
next step against that from the command to a fresh run's first step, and the steps made twice.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import psutil  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from pipeline.progress import Progress  # noqa: E402
from pipeline.specs import PreprocessSpec, TrainSpec  # noqa: E402
from pipeline.stages.preprocess import run_preprocess  # noqa: E402
from pipeline.stages.train import run_train  # noqa: E402
from pipeline.storage import Location  # noqa: E402

EVERY_S = 300.0  # the interval that a share is given for
TARGET_SHARE, TARGET_RESTART = 0.01, 1.3


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        dataset = made_up_dataset(Path(scratch))
        spec = spec_of(options)
        show(options, measure(spec, dataset, Location.parse(scratch), options))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=20, help="steps from checkpoint to checkpoint")
    parser.add_argument("--zero-stage", type=int, default=2)
    return parser.parse_args()


def spec_of(options: argparse.Namespace) -> TrainSpec:
    train = {
        "max_steps": options.steps,
        "num_workers": options.workers,
        "batch_tokens": 4096,
        "micro_batch_tokens": 2048,
        "checkpoint_every": options.every,
        "eval_every": 10**6,
        "use_gpu": False,
    }
    return TrainSpec.build(
        {
            "model": {"size": options.size, "context": 64},
            "train": train,
            "deepspeed": {"zero_stage": options.zero_stage},
            "cluster": {"num_cpus": 2},
        }
    )


def made_up_dataset(folder: Path) -> Location:
    words = "the a small large dog cat sees hears and or red blue house tree".split()
    lines = (
        " ".join(words[(i * 7 + j * j) % len(words)] for j in range(5 + i % 30))
        for i in range(8000)
    )
    (folder / "train.txt").write_text("\n".join(lines) + "\n")
    corpus = {"kind": "text", "train": str(folder / "train.txt")}
    spec = {
        "corpus": corpus,
        "tokenizer": {"kind": "bpe", "vocab_size": 500},
        "cluster": {"num_cpus": 2},
    }
    output = Location.parse(folder / "dataset")
    run_preprocess(PreprocessSpec.build(spec), {}, output)
    return output


class Watch:
    """Looks at a training in this process, many times a second."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.first_s: float | None = None

    @property
    def done(self) -> int:
        state = Progress.newest()
        done = int(state["done"]) if state and state["what"] == "train" else 0
        if done and self.first_s is None:
            self.first_s = time.monotonic() - self.started
        return done

    def until(self, condition: Callable[[int], bool]) -> int:
        while not condition(done := self.done):
            time.sleep(0.02)
        return done


def kill_worker(watch: Watch, after: int, found: dict[str, Any]) -> None:
    watch.until(lambda done: done >= after)
    (worker, *_) = [
        process
        for process in psutil.Process().children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]
    worker.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    time.sleep(1.0)  # what was under way to the driver has arrived
    last = watch.done
    again = watch.until(lambda done: done != last)
    found |= {"worker_s": time.monotonic() - killed, "worker_twice": last - again + 1}


def killed_driver(spec: TrainSpec, dataset: Location, output: Location, after: int) -> int:
    """Train in a process that kills itself and its own after a step; return that step."""
    context = get_context("spawn")  # a fork of a process that is connected to Ray hangs
    read, write = context.Pipe(duplex=False)
    driver = context.Process(target=_train_and_die, args=(spec, dataset, output, after, write))
    driver.start()
    step: int = read.recv()
    driver.join()
    return step


def _train_and_die(
    spec: TrainSpec, dataset: Location, output: Location, after: int, write: Connection
) -> None:
    threading.Thread(target=_report_and_die, args=(after, write), daemon=True).start()
    run_train(spec, {"dataset": dataset}, output)


def _report_and_die(after: int, write: Connection) -> None:
    write.send(Watch().until(lambda done: done >= after))
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def measure(
    spec: TrainSpec, dataset: Location, folder: Location, options: argparse.Namespace
) -> dict[str, Any]:
    after = options.steps // 2 + options.every // 2
    found: dict[str, Any] = {}
    found["driver_step"] = killed_driver(spec, dataset, folder / "driver", after)
    watch = Watch()
    thread = threading.Thread(target=watch.until, args=(bool,), daemon=True)
    thread.start()
    run_train(spec, {"dataset": dataset}, folder / "driver")
    thread.join()
    kept = (found["driver_step"] // options.every) * options.every
    found |= {"driver_s": watch.first_s, "driver_twice": found["driver_step"] - kept}

    watch = Watch()
    thread = threading.Thread(target=kill_worker, args=(watch, after, found), daemon=True)
    thread.start()
    figures = run_train(spec, {"dataset": dataset}, folder / "worker")
    thread.join()
    number = options.steps // options.every
    return found | {
        "fresh_s": watch.first_s,
        "share": figures["checkpoint_s"] / figures["time_s"],
        "checkpoint_s": figures["checkpoint_s"] / number,
    }


def show(options: argparse.Namespace, found: dict[str, Any]) -> None:
    console = Console(width=120)
    table = Table("what", "measured", "target")
    at_every = found["checkpoint_s"] / EVERY_S
    table.add_row("a checkpoint keeps training waiting", f"{found['checkpoint_s']:.3f} s", "")
    table.add_row(f"share at one every {options.every} steps", f"{found['share']:.2%}", "")
    table.add_row("share at one every 5 minutes", f"{at_every:.3%}", f"≤ {TARGET_SHARE:.0%}")
    table.add_row("fresh start: command to first step", f"{found['fresh_s']:.1f} s", "")
    for who in ("worker", "driver"):
        ratio = found[f"{who}_s"] / found["fresh_s"]
        table.add_row(
            f"{who} killed: to the next step",
            f"{found[f'{who}_s']:.1f} s = {ratio:.2f} of a fresh start",
            f"≤ {TARGET_RESTART}",
        )
        table.add_row(f"{who} killed: steps made twice", f"{found[f'{who}_twice']}", "")
    console.print(table)


if __name__ == "__main__":
    main()
