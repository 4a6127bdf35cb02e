"""Memory that an export takes, against the model's own size.

python benchmarks/export_memory.py --size gpt2 --ranks 2 --stage 3

A checkpoint as DeepSpeed writes it (float32, with Adam's moments) is made of a model with random
weights, without training; then `python jobs/export.py` reads it in a process of its own, of which
the peak of memory is taken, less what the same process has before it begins to read.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from della_model import Della
from pipeline.specs import TrainSpec
from pipeline.storage import Location
from pipeline.tokenization import train_bpe
from pipeline.training.checkpoint import TAG, RunState
from pipeline.training.description import describe_model
from pipeline.training.finding import STATE
from pipeline.training.model import Vocabulary, della_config
from pipeline.training.store import MANIFEST, Manifest, stored_folder

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="gpt2")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, choices=[2, 3], default=3)
    parser.add_argument("--vocab-size", type=int, default=50257)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # In a process of its own: a child begins with its parent's peak.
        with ProcessPoolExecutor(1, get_context("spawn")) as writer:
            model_bytes = writer.submit(write_checkpoint, folder / "step", options).result()
        on_disk = sum(
            f.stat().st_size for f in (folder / "step-000000001").rglob("*") if f.is_file()
        )
        before = peak_of(["-c", "import pipeline.stages.export, pipeline.training.description"])
        peak = peak_of(
            ["jobs/export.py", f"checkpoint={folder}/step-000000001", f"storage={folder}/runs"]
        )
    print(f"{options.size}, ZeRO stage {options.stage}, {options.ranks} ranks")
    print(f"weights {model_bytes / 1e6:,.0f} MB, checkpoint {on_disk / 1e6:,.0f} MB")
    print(f"peak {peak / 1e6:,.0f} MB, of these {before / 1e6:,.0f} MB by importing alone")
    print(f"(peak - imports) / weights = {(peak - before) / model_bytes:.2f}")


def write_checkpoint(folder: Path, options: argparse.Namespace) -> int:
    spec = TrainSpec.build(
        {
            "model": {"size": options.size, "context": 1024},
            "train": {"max_steps": 1},
            "deepspeed": {"zero_stage": options.stage},
        }
    )
    size = options.vocab_size
    model = Della(della_config(spec, Vocabulary(size, size, 0, 1, 2)))
    (folder / TAG).mkdir(parents=True)
    train_bpe([["a few words"]], 300).save_pretrained(folder / "tokenizer")
    describe_model(model, spec, Location.parse(folder / "tokenizer"), folder)
    record = {
        "format": 1, "state": asdict(RunState(step=1)), "world_size": options.ranks,
        "zero_stage": options.stage,
    }  # fmt: skip
    (folder / STATE).write_text(json.dumps(record))
    named = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    shapes = {name: p.shape for name, p in named.items()}
    model_states: dict[str, Any] = {
        "module": named if options.stage == 2 else {}, "buffer_names": [],
        "param_shapes": [shapes], "shared_params": {}, "frozen_param_shapes": {},
    }  # fmt: skip
    rank_name = "zero_pp_rank_{}_mp_rank_00"
    for rank in range(options.ranks):
        head = "mp_rank_00" if options.stage == 2 else rank_name.format(rank)
        torch.save(model_states, folder / TAG / f"{head}_model_states.pt")
        share = share_of(list(named.values()), rank, options)
        moments = {0: {"exp_avg": torch.zeros_like(share), "exp_avg_sq": torch.zeros_like(share)}}
        key = "single_partition_of_fp32_groups" if options.stage == 2 else "fp32_flat_groups"
        state = {key: [share], "partition_count": options.ranks, "base_optimizer_state": moments}
        file = folder / TAG / f"{rank_name.format(rank)}_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, file)
    target = Location.parse(folder.parent / "step-000000001")
    files = stored_folder(folder, target)
    Manifest(1, options.ranks, options.stage, None, files).save(target / MANIFEST)
    return sum(p.nbytes for p in named.values())


def share_of(parameters: list[torch.Tensor], rank: int, options: argparse.Namespace) -> Any:
    if options.stage == 2:
        line = torch.cat([p.reshape(-1) for p in parameters])
        return line.chunk(options.ranks)[rank].clone()
    shares = []
    for parameter in parameters:
        count = -(-parameter.numel() // options.ranks)
        share = torch.zeros(count)
        own = parameter.reshape(-1)[rank * count : (rank + 1) * count]
        share[: own.numel()] = own
        shares.append(share)
    return torch.cat(shares)


def peak_of(arguments: list[str]) -> int:
    """Bytes that a Python process held at most."""
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{arguments[0]} failed")
    peak: resource.struct_rusage = usage
    return peak.ru_maxrss * 1024


if __name__ == "__main__":
    main()
