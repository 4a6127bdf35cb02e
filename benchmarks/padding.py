"""How much of a batch is padding, with documents bucketed by length and without?

    python benchmarks/padding.py --text FILE --tokenizer FOLDER

Counts the positions of the micro-batches of one epoch, as training cuts them, against batches of as
many documents in the order of a plain shuffle.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from pipeline.batches import BatchOrder, accumulation_steps, split  # noqa: E402
from pipeline.storage import Location  # noqa: E402
from pipeline.tokenization import encoder_of, load_gpt2, load_hf  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True, help="GPT-2's files, or a hub id or folder")
    parser.add_argument("--max-tokens", type=int, default=512)
    options = parser.parse_args()
    lengths = document_lengths(options)
    table = Table("batch_tokens", "micro_batch_tokens", "bucketed", "shuffled")
    table.title = f"share of padding; {len(lengths):,} documents, {lengths.mean():.1f} tokens each"
    for batch_tokens, micro in ((8192, 8192), (8192, 2048), (32768, 8192)):
        bucketed, shuffled = padding(lengths, batch_tokens, micro)
        table.add_row(f"{batch_tokens:,}", f"{micro:,}", f"{bucketed:.2%}", f"{shuffled:.2%}")
    Console().print(table)


def document_lengths(options: argparse.Namespace) -> np.ndarray:
    folder = Location.parse(options.tokenizer)
    is_gpt2 = (folder / "vocab.json").is_file()
    tokenizer = load_gpt2(folder) if is_gpt2 else load_hf(options.tokenizer)
    lines = [line for line in options.text.read_text().splitlines() if line.strip()]
    lengths = encoder_of(tokenizer).encode(lines).lengths
    return lengths[lengths <= options.max_tokens]


def padding(lengths: np.ndarray, batch_tokens: int, micro: int) -> tuple[float, float]:
    order = BatchOrder(lengths, [len(lengths)], batch_tokens, 16_000_000, seed=0)
    accumulation = accumulation_steps(batch_tokens, micro, num_workers=1)
    batches = [batch for window in order.windows(0) for batch in window.batches]
    parts = [part for batch in batches for part in split(batch, 1, accumulation)[0] if len(part)]
    shuffled = np.random.default_rng(0).permutation(len(lengths))
    plain = np.split(shuffled, np.cumsum([len(part) for part in parts])[:-1])
    return share(lengths, parts), share(lengths, plain)


def share(lengths: np.ndarray, parts: list[np.ndarray]) -> float:
    positions = sum(len(part) * int(lengths[part].max()) for part in parts)
    return 1 - float(lengths.sum()) / positions


if __name__ == "__main__":
    main()
