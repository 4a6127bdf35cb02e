"""Memory that an export and a conversion take, against the model's own size.

python benchmarks/export_memory.py --sizes small gpt2 --ranks 2 --stage 3

DeepSpeed writes a checkpoint (float32, with Adam's moments) of a model with random weights after
one small step. Then `python jobs/export.py` reads it, and another process converts it for another
number of workers, as a run does that goes on. Memory is the most that such a process had for itself
(RssAnon: mapped files and shared libraries left out), less that of one that only imports the same;
neither starts further processes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import multiprocessing  # noqa: E402

from benchmarks.memory import PeakMemory  # noqa: E402
from della_model import Della  # noqa: E402
from pipeline.batches import MicroBatch  # noqa: E402
from pipeline.specs import TrainSpec  # noqa: E402
from pipeline.storage import Location  # noqa: E402
from pipeline.tokenization import train_bpe  # noqa: E402
from pipeline.training.model import Vocabulary, della_config  # noqa: E402
from pipeline.training.store import MANIFEST, Manifest, stored_folder  # noqa: E402

IMPORT_EXPORT = "import pipeline.stages.export, pipeline.training.description"
IMPORT_CONVERT = """
import sys
from deepspeed.checkpoint import ds_to_universal
from pipeline.storage import Location
from pipeline.training.checkpoint import TAG
from pipeline.training.store import MANIFEST, Manifest
from pipeline.training.universal import convert_once
"""
CONVERT = """
checkpoint = Location.parse(sys.argv[1])
convert_once(checkpoint, Manifest.load(checkpoint / MANIFEST), TAG, print)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["small", "gpt2"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, choices=[1, 2, 3], default=3)
    parser.add_argument("--vocab-size", type=int, default=50257)
    options = parser.parse_args()
    table = Table("size", "weights", "checkpoint", "", "own memory", "of weights", "of checkpoint")
    table.title = f"MB, ZeRO stage {options.stage}, {options.ranks} ranks"
    for size in options.sizes:
        for row in measure(size, options):
            table.add_row(*row)
    Console(width=100).print(table)


def measure(size: str, options: argparse.Namespace) -> list[list[str]]:
    """Rows of the table: the export, the conversion."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "step-000000001"
        weights = write_checkpoint(checkpoint, size, options)
        on_disk = sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file())
        export = ["jobs/export.py", f"checkpoint={checkpoint}", f"storage={scratch}/runs"]
        convert = ["-c", IMPORT_CONVERT + CONVERT, str(checkpoint)]
        peaks = {
            "export": peak_of(export) - peak_of(["-c", IMPORT_EXPORT]),
            "conversion": peak_of(convert) - peak_of(["-c", IMPORT_CONVERT]),
        }
    given = [size, f"{weights / 1e6:,.0f}", f"{on_disk / 1e6:,.0f}"]
    return [
        [*given, what, f"{p / 1e6:,.0f}", f"{p / weights:.2f}", f"{p / on_disk:.2f}"]
        for what, p in peaks.items()
    ]


def write_checkpoint(target: Path, size: str, options: argparse.Namespace) -> int:
    """Write one of so many ranks; return the bytes of the model's weights in float32."""
    written = target.parent / "written"
    written.mkdir()
    train_bpe([["a few words"]], 300).save_pretrained(target.parent / "tokenizer")
    multiprocessing.spawn(write_part, (written, size, options), nprocs=options.ranks)
    files = stored_folder(written, Location.parse(target))
    manifest = Manifest(1, options.ranks, options.stage, None, files)
    manifest.save(Location.parse(target) / MANIFEST)
    with torch.device("meta"):
        model = model_of(spec_of(size, options), options)
    return sum(p.nbytes for p in model.parameters())


def write_part(rank: int, folder: Path, size: str, options: argparse.Namespace) -> None:
    """One rank's part, after a step: before the first, stage 3 has no moments."""
    from pipeline.training.checkpoint import MeterState, RunState, write_checkpoint
    from pipeline.training.deepspeed_config import deepspeed_config
    from pipeline.training.engine import start_engine
    from pipeline.training.process import prepare_process

    ranks = options.ranks
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    meeting = f"file://{folder.parent}/meeting"
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=ranks)
    prepare_process(1, use_gpu=False)
    spec = spec_of(size, options)
    model = model_of(spec, options)
    shape = (1, model.config.num_latent_layers, model.config.latent_size)
    engine = start_engine(spec, model, deepspeed_config(spec, ranks, 1))
    ids = torch.arange(3, 11)[None]
    batch = MicroBatch(ids, torch.ones_like(ids), torch.zeros(shape), torch.ones(1))
    loss, _ = engine(**batch.arguments(torch.device("cpu")), beta=1.0)
    engine.backward(loss)
    engine.step()
    state, tokenizer = RunState(step=1), Location.parse(folder.parent / "tokenizer")
    write_checkpoint(engine, spec, state, MeterState(), rank, ranks, tokenizer, folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def spec_of(size: str, options: argparse.Namespace) -> TrainSpec:
    return TrainSpec.build(
        {
            "model": {"size": size, "context": 1024},
            "train": {"max_steps": 1},
            "deepspeed": {"zero_stage": options.stage},
        }
    )


def model_of(spec: TrainSpec, options: argparse.Namespace) -> Della:
    words = options.vocab_size
    return Della(della_config(spec, Vocabulary(words, words, 0, 1, 2)))


def peak_of(arguments: list[str]) -> int:
    """Bytes that a Python process had for itself at most."""
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    with PeakMemory(process.pid) as memory:
        status = process.wait()
    if status:
        sys.exit(f"{arguments[0]} failed")
    return memory.peak


if __name__ == "__main__":
    main()
