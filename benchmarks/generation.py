"""How fast does a Della generate, beside its backbone alone?

    python benchmarks/generation.py [--family llama] [--batches 1 8 32]

Both continue BOS by as many tokens as asked, greedily, with the key-value cache, by transformers'
own `generate`; no document ends before. They take turns, so that what else the machine does falls
on both; the figure is the median of the ratios. Weights are random, which costs what others cost.
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

from benchmarks.batches import END_OF_TEXT, VOCAB_SIZE  # noqa: E402
from della_model import SIZES, Della, DellaConfig, backbone_config  # noqa: E402
from della_model.backbones import BACKBONES  # noqa: E402

TARGET = 0.85


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", default="gpt2", choices=("gpt2", "llama"))
    parser.add_argument("--size", default="gpt2", choices=SIZES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--latent-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=4)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = backbone_config(
        options.family, options.size, VOCAB_SIZE, bos_token_id=END_OF_TEXT, eos_token_id=END_OF_TEXT
    )
    plain = BACKBONES[options.family].model_class(copy.deepcopy(config)).eval()
    sizes = {"latent_size": options.latent_size, "fusion_rank": options.rank}
    della = Della(DellaConfig(backbone=config, **sizes)).eval()
    table = Table(title=f"Generation, {options.family}, {options.size}, {options.tokens} tokens")
    for column in ("documents at once", "plain tokens/s", "Della tokens/s", "ratio", "from", "to"):
        table.add_column(column, justify="right")
    for batch in options.batches:
        start = torch.full((batch, 1), END_OF_TEXT)
        settings = {
            "attention_mask": torch.ones_like(start), "max_new_tokens": options.tokens,
            "do_sample": False, "eos_token_id": [], "pad_token_id": END_OF_TEXT,
        }  # fmt: skip
        latents = della.sample_prior(batch)

        def alone() -> None:
            plain.generate(start, **settings)  # noqa: B023

        def under_latents() -> None:
            della.generate(start, latents=latents, **settings)  # noqa: B023

        alone(), under_latents()
        pairs = [(timed(alone), timed(under_latents)) for _ in range(options.repeats)]
        ratios = [one / other for one, other in pairs]
        rates = [batch * options.tokens / statistics.median(c) for c in zip(*pairs, strict=True)]
        shown = [f"{rate:,.0f}" for rate in rates]
        figures = [statistics.median(ratios), min(ratios), max(ratios)]
        table.add_row(str(batch), *shown, *(f"{figure:.2f}" for figure in figures))
    console = Console()
    console.print(table)
    console.print(f"{options.repeats} pairs each; to reach: ≥ {TARGET} × the plain tokens/s")


def timed(generate: Callable[[], None]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    generate()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
