"""What do Ray Train and DeepSpeed cost a training step, and how long does it wait for data?

    python benchmarks/training_overhead.py --text FILE

One Ray Train worker with DeepSpeed against a plain PyTorch loop over the same batches of the same
model; medians over turns. Both sides include reading, padding and the update. They take turns in
one process, so that they meet the same state of the machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from pipeline.cluster import connected  # noqa: E402
from pipeline.shards import Dataset  # noqa: E402
from pipeline.specs import PreprocessSpec, TrainSpec  # noqa: E402
from pipeline.storage import Location  # noqa: E402

TARGET_SPEED, TARGET_WAIT = 0.95, 0.01


def main() -> None:
    options = parse()
    spec = TrainSpec.build(
        {
            "model": {"size": options.size, "context": options.max_tokens, "dropout": 0.1},
            "train": {
                "max_steps": options.turns * (options.warmup + options.steps),
                "batch_tokens": options.batch_tokens,
                "micro_batch_tokens": options.batch_tokens,
                "use_gpu": False,
            },
            "deepspeed": {"zero_stage": options.zero_stage},
            "cluster": {"num_cpus": 2},
        }
    )
    with tempfile.TemporaryDirectory() as scratch, connected(spec.cluster):
        folder = Location.parse(scratch)
        dataset = options.dataset and Location.parse(options.dataset)
        dataset = dataset or preprocessed(options, folder / "dataset")
        results = measure(spec, dataset, folder / "run", options)
    show(results, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="a file with one document a line")
    source.add_argument("--dataset", help="a folder that jobs/preprocess.py made")
    parser.add_argument("--size", default="tiny", help="model size")
    parser.add_argument("--vocab-size", type=int, default=4000)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    return parser.parse_args()


def preprocessed(options: argparse.Namespace, output: Location) -> Location:
    from pipeline.stages.preprocess import run_preprocess

    values = {
        "corpus": {
            "kind": "text",
            "train": options.text,
            "max_tokens": options.max_tokens,
            "max_rejected": 1.0,
        },
        "tokenizer": {"kind": "bpe", "vocab_size": options.vocab_size},
    }
    run_preprocess(PreprocessSpec.build(values), {}, output)
    return output


def measure(
    spec: TrainSpec, dataset: Location, output: Location, options: argparse.Namespace
) -> list[dict[str, float]]:
    """Run both sides in turns inside one Ray Train worker; a row for each turn."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    def loop(config: dict[str, Any]) -> None:
        # The plain side runs here too: same process, same core, same state of the machine.
        rows = in_turns(**config)
        (output / "rows.json").write_json(rows)
        ray.train.report({})

    TorchTrainer(
        loop,
        train_loop_config={
            "spec": spec,
            "dataset": dataset,
            "turns": options.turns,
            "warmup": options.warmup,
            "steps": options.steps,
        },
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(storage_path=output.path, name="train"),
    ).fit()
    rows: list[dict[str, float]] = (output / "rows.json").read_json()
    return rows


def in_turns(
    spec: TrainSpec, dataset: Location, turns: int, warmup: int, steps: int
) -> list[dict[str, float]]:
    from pipeline.batches import Position
    from pipeline.training.meter import Meter
    from pipeline.training.setup import start_run
    from pipeline.training.worker import train_step

    run = start_run(spec, dataset, rank=0, num_workers=1, use_gpu=False)
    plain = PlainLoop(spec, Dataset.open(dataset))
    meter = Meter(run.num_layers, run.device)
    rows = []
    with closing(run.loader(Position())) as loader, closing(run.loader(Position())) as other:
        done = 0
        for _ in range(turns):
            row: dict[str, float] = {}
            for measured, count in ((False, warmup), (True, steps)):
                tokens, waited, started = 0, loader.waited_s, time.perf_counter()
                for step in range(done, done + count):
                    batch = loader.next()
                    train_step(run, step, batch, meter)
                    tokens += batch.num_tokens
                meter.reduced()
                took = time.perf_counter() - started
                if measured:
                    row["ours"] = tokens / took
                    row["waiting"] = (loader.waited_s - waited) / took
                tokens, started = 0, time.perf_counter()
                for step in range(done, done + count):
                    batch = other.next()
                    plain.step(step, batch)
                    tokens += batch.num_tokens
                if measured:
                    row["plain"] = tokens / (time.perf_counter() - started)
                done += count
            rows.append(row)
    return rows


class PlainLoop:
    """The same training in plain PyTorch."""

    def __init__(self, spec: TrainSpec, dataset: Dataset) -> None:
        import torch

        from della_model import Objective
        from pipeline.training.engine import parameter_groups
        from pipeline.training.model import (
            Vocabulary,
            beta_schedule,
            build_model,
            learning_rate_schedule,
        )

        self._spec = spec
        model = build_model(spec, Vocabulary.of(dataset))
        self._objective = Objective(model, spec.train.free_bits).train()
        self._optimizer = torch.optim.AdamW(
            parameter_groups(model, spec.train.weight_decay),
            lr=spec.train.learning_rate,
            betas=(spec.train.adam_beta1, spec.train.adam_beta2),
        )
        self._beta = beta_schedule(spec, spec.train.max_steps or 1)
        self._rate = learning_rate_schedule(spec, spec.train.max_steps or 1)

    def step(self, step: int, batch: Any) -> None:
        """One optimizer step."""
        import torch

        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(step)
        for micro in batch.micro_batches:
            loss, _ = self._objective(
                micro.input_ids,
                micro.attention_mask,
                micro.noise,
                micro.document_weight,
                self._beta(step),
            )
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self._objective.parameters(), self._spec.train.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()


def show(rows: list[dict[str, float]], options: argparse.Namespace) -> None:
    ours = statistics.median(row["ours"] for row in rows)
    plain = statistics.median(row["plain"] for row in rows)
    ratio = statistics.median(row["ours"] / row["plain"] for row in rows)
    waiting = statistics.median(row["waiting"] for row in rows)
    table = Table(
        "what",
        "measured",
        "target",
        title=f"training, {options.size}, ZeRO-{options.zero_stage}, {len(rows)} turns",
    )
    table.add_row("Ray Train + DeepSpeed, 1 worker, tokens/s", f"{ours:,.0f}", "")
    table.add_row("plain loop, tokens/s", f"{plain:,.0f}", "")
    table.add_row("ratio, median of turns", f"{ratio:.3f}", f"≥ {TARGET_SPEED}")
    table.add_row("waiting for data", f"{waiting:.2%}", f"≤ {TARGET_WAIT:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
