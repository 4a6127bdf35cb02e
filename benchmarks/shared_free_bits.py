"""What does the extra pass of the encoder cost that free bits of a divided batch need?

    python benchmarks/shared_free_bits.py [--sizes tiny small gpt2] [--repeats 15]

A training step with `free_bits_per=batch`, without that pass (the batch is whole) and with it (one
part of a batch), in turns on the same batches of random documents; the figure is the median of the
ratios. Float32, dropout as in training, AdamW, one thread, GPT-2's vocabulary of 50,257.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.batches import VOCAB_SIZE, Batch, bucketed, documents_of  # noqa: E402
from della_model import SIZES, Della, DellaConfig, Objective, backbone_config  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small", "gpt2"], choices=SIZES)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batches = bucketed(documents_of(None, None), arguments.batch_tokens, arguments.repeats + 1)
    table = Table(title="A step with the extra pass, over one without")
    for column in ("size", "s a step without", "median", "least", "most"):
        table.add_column(column, justify="left" if column == "size" else "right")
    for size in arguments.sizes:
        whole, ratios = ratios_of(size, batches)
        table.add_row(
            size, f"{whole:.3f}", *(f"{f(ratios):.2f}" for f in (statistics.median, min, max))
        )
    Console().print(table)


def ratios_of(size: str, batches: list[Batch]) -> tuple[float, list[float]]:
    """Median seconds of a step on a whole batch; for each batch, how much longer one of parts is.

    The first batch warms up.
    """
    backbone = backbone_config("gpt2", size, VOCAB_SIZE)
    objective = Objective(
        Della(DellaConfig(backbone=backbone, latent_size=8)), 5.0, "batch"
    ).train()
    optimizer = torch.optim.AdamW(objective.parameters())
    pairs = [
        (timed(objective, optimizer, batch, False), timed(objective, optimizer, batch, True))
        for batch in batches
    ][1:]
    return statistics.median(whole for whole, _ in pairs), [part / whole for whole, part in pairs]


def timed(
    objective: Objective, optimizer: torch.optim.Optimizer, batch: Batch, divided: bool
) -> float:
    """Seconds of one step, each document of equal weight."""
    count = len(batch[0])
    given = (*batch, objective.model.draw_noise(count), torch.full((count,), 1 / count), 1.0)
    start = time.perf_counter()
    batch_kl = None
    if divided:
        with torch.no_grad():
            _, sums = objective(*given, only_kl=True)
        batch_kl = sums["charged_kl"] / sums["num_documents"]
    loss, _ = objective(*given, batch_kl=batch_kl)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
