"""How fast preprocess is, against the tokenizers library and `datasets.map` on the same cores.

    python benchmarks/preprocess.py --text FILE --tokenizer FOLDER_WITH_vocab.json_AND_merges.txt

The text's lines are repeated, each made distinct by a number, up to `--lines`. Each round runs
the three one after the other on the same lines; the table shows medians over the rounds, and the
ratios of ours to the others (higher is better).

What is timed: reading the file, tokenising, and what each does with the result.
  ours             `run_preprocess`'s stage: read, check, tokenise, write shards with checksums;
                   from starting the actors to the last shard, Ray being up
  encode_batch     `Tokenizer.encode_batch` in one process on as many threads, in batches of 10,000
                   lines; the result is thrown away: nothing is checked, hashed or written
  datasets.map     `load_dataset("text")` done before; `map(batched=True, num_proc=cores)` with a
                   fast tokenizer, which writes an Arrow cache
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
# Ray gives its workers a low priority; on a machine that is not idle they alone would wait.
os.environ.setdefault("RAY_worker_niceness", "0")
from rich.console import Console
from rich.table import Table

from pipeline.cluster import connected
from pipeline.specs import ClusterSpec, PreprocessSpec
from pipeline.stages.preprocess import run_preprocess
from pipeline.storage import Location
from pipeline.tokenization import backend_of, load_gpt2, rust_threads

_AT_ONCE = 10_000  # lines; fewer leave threads idle


def distinct_lines(source: Path, count: int) -> Iterator[str]:
    """`count` lines, none the same: the source's, over and over, each round with its number."""
    lines = [line for line in source.read_text().splitlines() if line.strip()]
    for number in range(count):
        line = lines[number % len(lines)]
        yield line if number < len(lines) else f"{line} {number // len(lines)}"


def time_ours(text: Path, tokenizer: Path, cores: int, folder: Path) -> float:
    """Tokens/s of the stage."""
    spec = PreprocessSpec.build(
        {
            "corpus": {"kind": "text", "train": str(text), "valid_fraction": 0, "test_fraction": 0},
            "tokenizer": {"kind": "gpt2", "path": str(tokenizer)},
            "cluster": {"num_cpus": cores},
        }
    )
    figures = run_preprocess(spec, {}, Location.parse(folder))
    return float(figures["tokens_per_s"])


def time_encode_batch(text: Path, tokenizer: Path) -> float:
    """Tokens/s of the library alone, BOS and EOS counted as ours are."""
    backend = backend_of(load_gpt2(Location.parse(tokenizer)))
    with rust_threads(True):
        started = time.perf_counter()
        tokens = 0
        with text.open() as file:
            while lines := list(islice(file, _AT_ONCE)):
                encoded = backend.encode_batch([line.rstrip("\n") for line in lines])
                tokens += sum(map(len, encoded)) + 2 * len(encoded)
        return tokens / (time.perf_counter() - started)


def time_datasets_map(text: Path, tokenizer: Path, cores: int, folder: Path) -> float:
    """Tokens/s of `datasets.map` with as many processes."""
    import datasets

    fast = load_gpt2(Location.parse(tokenizer))
    loaded = datasets.load_dataset(
        "text", data_files=str(text), split="train", cache_dir=str(folder)
    )

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": fast(batch["text"], return_attention_mask=False)["input_ids"]}

    with rust_threads(False):
        started = time.perf_counter()
        mapped = loaded.map(
            tokenise, batched=True, num_proc=cores, remove_columns=["text"],
            load_from_cache_file=False,
        )  # fmt: skip
        took = time.perf_counter() - started
    lengths = mapped.with_format("arrow")[:].column("input_ids")
    return (sum(len(chunk.flatten()) for chunk in lengths.chunks) + 2 * len(mapped)) / took


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, nargs="+")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--lines", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    args = parser.parse_args()
    table = Table(
        "text", "ours", "encode_batch", "datasets.map", "ours / encode_batch",
        "ours / datasets.map",
        title=f"tokens/s on {args.cores} cores, {args.lines:,} lines, median of {args.rounds}",
    )  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as scratch,
        connected(ClusterSpec(num_cpus=args.cores)),
    ):
        folder = Path(scratch)
        for source in args.text:
            text = folder / "lines.txt"
            text.write_text("\n".join(distinct_lines(source, args.lines)) + "\n")
            warm = folder / "warm.txt"
            # Imports, and what Ray does once, are over before the first round.
            warm.write_text("\n".join(distinct_lines(source, args.lines // 5)) + "\n")
            time_ours(warm, args.tokenizer, args.cores, folder / "warm")
            rounds = []
            for _ in range(args.rounds):
                rounds.append(
                    (
                        time_ours(text, args.tokenizer, args.cores, folder / "ours"),
                        time_encode_batch(text, args.tokenizer),
                        time_datasets_map(text, args.tokenizer, args.cores, folder / "hf"),
                    )
                )
                for name in ("ours", "hf"):
                    shutil.rmtree(folder / name)
            shutil.rmtree(folder / "warm")
            ours, library, mapped = (statistics.median(r[i] for r in rounds) for i in range(3))
            table.add_row(
                "/".join(source.parts[-2:]), f"{ours:,.0f}", f"{library:,.0f}", f"{mapped:,.0f}",
                f"{statistics.median(r[0] / r[1] for r in rounds):.2f}",
                f"{statistics.median(r[0] / r[2] for r in rounds):.2f}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
