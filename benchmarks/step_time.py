"""How much longer does a training step of DELLA take than one of its backbone alone?

    python benchmarks/step_time.py --text train.txt --tokenizer FOLDER [--family llama]

The folder holds `vocab.json` and `merges.txt` of GPT-2.

12 layers × 768, GPT-2's vocabulary, float32, dropout as in training, AdamW, batches of documents of
like length. Both models make their steps on the same batches, in turns, so that what else the
machine does falls on both; the figure is the median of the ratios. Tokens are unpadded ones.

Peak memory is that of two steps on the longest documents, each model in a process of its own: all
that the process has for itself (weights, gradients, AdamW's moments, activations) over what its
imports take. Without `--text`, token ids are drawn at random, with lengths like a corpus of
sentences.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.batches import VOCAB_SIZE, Batch, bucketed, documents_of  # noqa: E402
from benchmarks.memory import GIB, peak_alone  # noqa: E402
from della_model import SIZES, Della, DellaConfig, Objective, backbone_config  # noqa: E402
from della_model.backbones import BACKBONES  # noqa: E402

TIME_TARGET, MEMORY_TARGET = 2.15, 2.0
FAMILIES = ("gpt2", "llama")

Step = Callable[[Batch], None]


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    documents = documents_of(arguments.text, arguments.tokenizer)
    batches = bucketed(documents, arguments.batch_tokens, arguments.repeats + 1)
    batches = [(ids.to(arguments.device), mask.to(arguments.device)) for ids, mask in batches]
    longest = max(batches, key=lambda batch: batch[0].shape[1])
    peaks = None
    if arguments.device == "cpu":
        steps = (plain_step, della_step)
        peaks = [peak_alone(two_steps, make, arguments, longest) for make in steps]
    plain, della = plain_step(arguments), della_step(arguments)
    for step in (plain, della):  # memory, optimizer states and kernels
        step(batches[0])
    times = [(timed(plain, batch), timed(della, batch)) for batch in batches[1:]]
    report(arguments, times, batches[1:], peaks)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="one document a line")
    parser.add_argument("--tokenizer", type=Path, help="folder with vocab.json and merges.txt")
    parser.add_argument("--family", default="gpt2", choices=FAMILIES)
    parser.add_argument("--size", default="gpt2", choices=SIZES)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--latent-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.text and not arguments.tokenizer:
        parser.error("--text needs --tokenizer: token counts depend on it")
    return arguments


def plain_step(arguments: argparse.Namespace) -> Step:
    """One step of the backbone as a language model, by transformers alone."""
    config = backbone_config(arguments.family, arguments.size, VOCAB_SIZE)
    model = BACKBONES[arguments.family].model_class(config).train().to(arguments.device)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(batch: Batch) -> None:
        input_ids, mask = batch
        labels = input_ids.masked_fill(mask == 0, -100)
        loss = model(input_ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def della_step(arguments: argparse.Namespace) -> Step:
    """One step of a Della around the same backbone."""
    config = DellaConfig(
        backbone=copy.deepcopy(backbone_config(arguments.family, arguments.size, VOCAB_SIZE)),
        latent_size=arguments.latent_size,
        fusion_rank=arguments.rank,
    )
    return objective_step(Objective(Della(config).to(arguments.device)).train())


def objective_step(objective: Objective) -> Step:
    """One step of AdamW on an objective, each document of the batch of equal weight."""
    optimizer = torch.optim.AdamW(objective.parameters())

    def step(batch: Batch) -> None:
        count = len(batch[0])
        weight = torch.full((count,), 1 / count, device=batch[0].device)
        loss, _ = objective(*batch, objective.model.draw_noise(count), weight, 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def two_steps(
    make: Callable[[argparse.Namespace], Step], arguments: argparse.Namespace, batch: Batch
) -> None:
    """In a process of its own: the second step has gradients and moments from the first."""
    step = make(arguments)
    for _ in range(2):
        step(batch)


def timed(step: Step, batch: Batch) -> float:
    """Seconds of one step."""
    synchronize = torch.cuda.synchronize if batch[0].is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    step(batch)
    synchronize()
    return time.perf_counter() - start


def report(
    arguments: argparse.Namespace,
    times: list[tuple[float, float]],
    batches: list[Batch],
    peaks: list[int] | None,
) -> None:
    ratios = [della / plain for plain, della in times]
    tokens = [int(mask.sum()) for _, mask in batches]
    table = Table(title=f"One training step, {arguments.family}, {arguments.size}")
    for column in ("", "s a step", "tokens/s", "ratio", "peak GiB", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for index, name in enumerate(("plain backbone", "Della")):
        seconds = [pair[index] for pair in times]
        rate = statistics.median(n / s for n, s in zip(tokens, seconds, strict=True))
        table.add_row(
            name,
            f"{statistics.median(seconds):.3f}",
            f"{rate:,.0f}",
            f"{statistics.median(ratios) if index else 1:.2f}",
            f"{peaks[index] / GIB:.2f}" if peaks else "–",
            f"{peaks[index] / peaks[0]:.2f}" if peaks else "–",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{len(times)} pairs of steps; ratios of time {min(ratios):.2f} to {max(ratios):.2f}; "
        f"{statistics.mean(tokens):,.0f} unpadded tokens a batch; "
        f"to reach: ≤ {TIME_TARGET} × the time, ≤ {MEMORY_TARGET} × the memory"
    )


if __name__ == "__main__":
    main()
