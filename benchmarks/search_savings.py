"""How many steps does early stopping save a search, and does it find what running all finds?

    python benchmarks/search_savings.py --text FOLDER_WITH_train.txt_valid.txt_test.txt

The same trials (random, one seed) twice on one dataset: ASHA, and all to their end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from commands import run_job
from rich.console import Console
from rich.table import Table

SPACE = (
    "search.space={train.learning_rate: {loguniform: [1.0e-4, 3.0e-2]}, "
    "train.free_bits: {uniform: [0.0, 1.0]}}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=3, help="3: two trials of a worker at once")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage:
        dataset = run_job(
            "preprocess", "corpus=text", f"storage={storage}", "tokenizer.vocab_size=2000",
            *(f"corpus.{split}={options.text / split}.txt" for split in ("train", "valid", "test")),
        )  # fmt: skip
        results = {name: search(options, storage, dataset, name) for name in ("asha", "none")}
    table = Table("scheduler", "trial-steps", "stopped", "best −ELBO", "learning rate", "time")
    for name, (figures, took) in results.items():
        table.add_row(
            name, f"{figures['trial_steps']:,}", str(figures["num_stopped"]),
            f"{figures['best_value']:.3f}",
            f"{figures['best_settings']['train.learning_rate']:.3g}", f"{took:.0f} s",
        )  # fmt: skip
    Console().print(table)
    asha, everything = (results[name][0] for name in ("asha", "none"))
    saved = 1 - asha["trial_steps"] / everything["trial_steps"]
    apart = asha["best_value"] - everything["best_value"]
    print(f"saved {100 * saved:.0f}% of the trial-steps; ASHA's best is {apart:+.3f} nats apart")


def search(
    options: argparse.Namespace, storage: str, dataset: str, scheduler: str
) -> tuple[dict[str, Any], float]:
    """The figures of one search, and its seconds."""
    started = time.monotonic()
    folder = run_job(
        "tune", f"dataset={dataset}", f"storage={storage}", f"num_trials={options.trials}",
        "search.sampler=random", f"search.scheduler={scheduler}", SPACE, "model=tiny",
        "model.context=256", f"train.max_steps={options.steps}", "train.batch_tokens=2048",
        f"train.eval_every={max(options.steps // 6, 1)}", "train.eval_documents=200",
        "train.checkpoint_every=1000", "train.warmup_steps=10", "deepspeed=zero0",
        f"train.num_workers={options.workers}", f"cluster.num_cpus={options.cpus}",
    )  # fmt: skip
    record = json.loads((Path(folder) / "artifact.json").read_text())
    return record["figures"], time.monotonic() - started


if __name__ == "__main__":
    main()
