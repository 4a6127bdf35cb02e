"""How does the time of a training step grow with latent layers, latent size, rank and batch?

    python benchmarks/scaling.py --text train.txt --tokenizer FOLDER

Each setting makes its steps in turns with the one in the middle of all, on the same batches; a
ratio is the median over the pairs. GPT-2's family and vocabulary, float32, AdamW.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.batches import VOCAB_SIZE, Batch, bucketed, documents_of  # noqa: E402
from benchmarks.step_time import objective_step, timed  # noqa: E402
from della_model import SIZES, Della, DellaConfig, Objective, gpt2_config  # noqa: E402

MIDDLE = {"latent_size": 32, "fusion_rank": 4, "batch_tokens": 1024}
VARIED: dict[str, tuple[int, ...]] = {
    "latent_size": (8, 32, 128),
    "fusion_rank": (1, 2, 4, 8),
    "batch_tokens": (512, 1024, 2048),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="one document a line")
    parser.add_argument("--tokenizer", type=Path, help="folder with vocab.json and merges.txt")
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    documents = documents_of(options.text, options.tokenizer)
    layers = SIZES[options.size].num_layers
    settings = [("latent_layers", n, latent_layers(n, layers)) for n in (0, 1, layers // 2, layers)]
    settings += [(name, n, {name: n}) for name, values in VARIED.items() for n in values]
    table = Table(title=f"A training step of {options.size} ({layers} layers); ratio to the middle")
    for column in ("what", "value", "s a step", "ratio", "from", "to"):
        table.add_column(column, justify="left" if column == "what" else "right")
    middle = step_of(options, {})
    for name, value, changes in settings:
        changed = step_of(options, changes)
        same = batches_of(documents, MIDDLE["batch_tokens"], options.repeats)
        other = batches_of(
            documents, changes.get("batch_tokens", MIDDLE["batch_tokens"]), options.repeats
        )
        pairs = list(zip(same, other, strict=True))
        middle(pairs[0][0]), changed(pairs[0][1])  # memory, moments
        times = [(timed(middle, a), timed(changed, b)) for a, b in pairs[1:]]
        ratios = [theirs / ours for ours, theirs in times]
        seconds = statistics.median(theirs for _, theirs in times)
        figures = [statistics.median(ratios), min(ratios), max(ratios)]
        shown = [f"{figure:.2f}" for figure in figures]
        table.add_row(name, str(value), f"{seconds:.3f}", *shown)
    console = Console()
    console.print(table)
    console.print(f"The middle: {MIDDLE}, latents in all {layers} layers; {options.repeats} pairs")


def batches_of(documents: list[Tensor], tokens: int, repeats: int) -> list[Batch]:
    """Batches of `tokens` tokens, of the same lengths in the same order whatever their size."""
    torch.manual_seed(0)
    return bucketed(documents, tokens, repeats + 1)


def latent_layers(count: int, layers: int) -> dict[str, Any]:
    """The topmost `count` layers have latents."""
    return {"latents": "none"} if count == 0 else {"latent_layers": [layers - count, layers - 1]}


def step_of(options: argparse.Namespace, changes: dict[str, Any]) -> Any:
    """One step of a model with the middle's settings but for `changes`."""
    fields = {name: value for name, value in MIDDLE.items() if name != "batch_tokens"} | changes
    fields.pop("batch_tokens", None)
    config = DellaConfig(backbone=gpt2_config(options.size, VOCAB_SIZE), **fields)
    return objective_step(Objective(Della(config)).train())


if __name__ == "__main__":
    main()
