"""Peak memory of a worker under ZeRO-3, with one worker and with two, on one big backbone.

    python benchmarks/zero3_memory.py --text FILE [--layers 40 --hidden 1024 --vocab 32000]

A Llama of the size asked for is made at random and saved as sharded safetensors; then real training
steps start from that folder, in one process and in two. Memory is what a process has for itself
(RssAnon: mapped files and shared libraries left out), looked at every few milliseconds.

More than half with two workers is what each needs whole: with a shared encoder the gradients of the
whole backbone, which wait in the backward pass for those of its second use.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import multiprocessing  # noqa: E402

from benchmarks.memory import GIB, PeakMemory, own_memory  # noqa: E402
from pipeline.corpora import index_corpus  # noqa: E402
from pipeline.corpora.commit import commit  # noqa: E402
from pipeline.corpora.writing import process_unit  # noqa: E402
from pipeline.specs import PreprocessSpec, TrainSpec  # noqa: E402
from pipeline.stages.preprocess import recipe_of  # noqa: E402
from pipeline.storage import Location  # noqa: E402


def make_backbone(options: argparse.Namespace, folder: Path) -> int:
    """Save a random Llama in several files; return its number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocab,
            hidden_size=options.hidden,
            intermediate_size=options.hidden * 8 // 3 // 64 * 64,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 64,
            num_key_value_heads=options.hidden // 128,
            max_position_embeddings=256,
            pad_token_id=None,
        )
    )
    model.save_pretrained(folder, max_shard_size="200MB")
    count: int = model.num_parameters()
    return count


def make_dataset(text: Path, folder: Path) -> None:
    """A few hundred lines of the text, tokenised in this process."""
    few = folder / "few.txt"
    few.write_text("\n".join(text.read_text().splitlines()[:600]) + "\n")
    spec = PreprocessSpec.build(
        {
            "corpus": {"kind": "text", "train": str(few), "max_tokens": 60, "max_rejected": 1.0},
            "tokenizer": {"kind": "bpe", "vocab_size": 2000},
        }
    )
    index, output = index_corpus(spec.corpus, spec.shard_bytes), Location.parse(folder / "dataset")
    recipe, about = recipe_of(spec, index, output, Console(quiet=True))
    commit(index, recipe, about, [process_unit(unit, recipe) for unit in index.units])


def train(rank: int, num_workers: int, port: int, given: dict[str, Any]) -> None:
    """One worker: the steps, and its peak of memory while loading and while training."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
        "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_workers),
    }  # fmt: skip
    torch.distributed.init_process_group("gloo", rank=rank, world_size=num_workers)
    from pipeline.batches import Position
    from pipeline.training.meter import Meter
    from pipeline.training.setup import start_run
    from pipeline.training.worker import train_step

    spec = TrainSpec.build(given["spec"])
    before = own_memory()
    with PeakMemory() as loading:
        run = start_run(spec, Location.parse(given["dataset"]), rank, num_workers, use_gpu=False)
    with PeakMemory() as training:
        loader = run.loader(Position())
        meter = Meter(run.num_layers, run.device)
        for step in range(given["steps"]):
            train_step(run, step, loader.next(), meter)
        loader.close()
    found = {
        "before": before, "loading": loading.peak, "training": training.peak,
        "loss": meter.reduced()["loss"], "parameters": run.parameters.total,
    }  # fmt: skip
    torch.save(found, Path(given["out"]) / f"{num_workers}-{rank}.pt")
    torch.distributed.destroy_process_group()


def spec_of(backbone: Path, encoder: str, precision: str) -> dict[str, Any]:
    return {
        "model": {
            "backbone": str(backbone), "latent_size": 32, "dropout": 0.0, "encoder": encoder,
        },
        "train": {
            "max_steps": 10, "batch_tokens": 256, "micro_batch_tokens": 128, "warmup_steps": 0,
            "activation_checkpointing": True, "precision": precision,
        },
        "deepspeed": {"zero_stage": 3},
    }  # fmt: skip


@contextmanager
def free_port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--encoder", default="shared", choices=("shared", "separate"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    table = Table("workers", "before", "loading", "training", "of one worker's", "loss")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        count = make_backbone(options, folder / "backbone")
        make_dataset(options.text, folder)
        given = {
            "spec": spec_of(folder / "backbone", options.encoder, options.precision),
            "dataset": str(folder / "dataset"),
            "steps": options.steps, "out": str(folder),
        }  # fmt: skip
        alone = 0
        for num_workers in (1, 2):
            with free_port() as port:
                multiprocessing.spawn(
                    partial(_spawned, num_workers, port, given), nprocs=num_workers, join=True
                )
            for rank in range(num_workers):
                found = torch.load(folder / f"{num_workers}-{rank}.pt")
                peak = max(found["loading"], found["training"]) - found["before"]
                alone = alone or peak
                table.add_row(
                    f"{num_workers} (rank {rank})",
                    *(f"{found[name] / GIB:.2f}" for name in ("before", "loading", "training")),
                    f"{peak / alone:.2f}",
                    f"{found['loss']:.4f}",
                )
        table.title = (
            f"GiB of a worker under ZeRO-3, {options.precision}, encoder {options.encoder}: "
            f"backbone {count / 1e6:.0f} million parameters, "
            f"model {found['parameters'] / 1e6:.0f} million"
        )
    Console().print(table)


def _spawned(num_workers: int, port: int, given: dict[str, Any], rank: int) -> None:
    train(rank, num_workers, port, given)


if __name__ == "__main__":
    main()
