"""The export stage: a training checkpoint into one `from_pretrained` folder, without Ray or GPU.

Tensors go one at a time from the ranks' files into safetensors, so that memory holds one file of
weights at most, and of a small model all of it.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipeline.specs.export import ExportSpec
from pipeline.storage import Location
from pipeline.training.finding import find_checkpoint, read_manifest, torn_explained
from pipeline.training.store import verified

if TYPE_CHECKING:
    import torch

    from della_model import Della
    from pipeline.specs import TrainSpec
    from pipeline.training.checkpoint_tensors import CheckpointTensors

WEIGHTS = "weights"
# Of one file of weights, which is held until it is full: what the export's memory is bounded by.
FILE_BYTES = 512 << 20


def run_export(spec: ExportSpec, inputs: dict[str, Location], output: Location) -> dict[str, Any]:
    """Write `weights/` from a checkpoint: of any ZeRO stage, any number of ranks.

    Returns:
        The checkpoint's step, ZeRO stage and number of ranks, parameters and bytes of the weights,
        and seconds.

    Raises:
        UserError: if there is no checkpoint, it is torn or does not say which model it is of, or
            its files name code.
    """
    from pipeline.training.description import described_model, described_spec
    from pipeline.training.export import replace_folder

    console = Console()
    checkpoint = find_checkpoint(inputs["checkpoint"], spec.which)
    manifest = read_manifest(checkpoint)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="export-") as scratch, _beside(output) as folder:
        with torn_explained(checkpoint):
            source = verified(checkpoint, manifest.files, Path(scratch))
        settings = described_spec(source)
        model = described_model(source, settings)
        num_parameters = write_weights(source, model, settings, folder)
        num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        replace_folder(folder, output / WEIGHTS)
    figures = {
        "step": manifest.step,
        "zero_stage": manifest.zero_stage,
        "num_ranks": manifest.world_size,
        "num_parameters": num_parameters,
        "bytes": num_bytes,
        "export_s": round(time.monotonic() - started, 3),
    }
    console.print(
        f"{num_parameters:,} parameters of step {figures['step']:,} (ZeRO stage "
        f"{figures['zero_stage']}, {figures['num_ranks']} ranks) in {output / WEIGHTS}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return figures


def write_weights(source: Path, model: Della, spec: TrainSpec, folder: Path) -> int:
    """Write a local checkpoint's weights, configuration and tokenizer; return how many numbers."""
    from pipeline.training.checkpoint import TAG
    from pipeline.training.checkpoint_tensors import CheckpointTensors
    from pipeline.training.description import FOLDER
    from pipeline.training.export import ADAPTER, merged_tensors, write_adapter, write_tensors

    tensors = CheckpointTensors(source / TAG)
    names = {id(parameter): f"model.{name}" for name, parameter in model.named_parameters()}

    def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
        return tensors.read(names[id(parameter)])

    count = 0

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal count
        for name, tensor in merged_tensors(model, whole):
            count += tensor.numel()
            yield name, tensor
        yield from _buffers(model, tensors)

    write_tensors(counted(), folder, file_bytes=FILE_BYTES)
    write_adapter(model, spec, folder / ADAPTER, whole)
    shutil.copytree(source / FOLDER, folder, dirs_exist_ok=True)
    return count


def _buffers(model: Della, tensors: CheckpointTensors) -> Iterator[tuple[str, torch.Tensor]]:
    for name in tensors.buffer_names:
        own = name.removeprefix("model.")
        if own != name and own in dict(model.named_buffers()):
            yield own, tensors.read(name)


@contextmanager
def _beside(output: Location) -> Iterator[Path]:
    """A new folder on the disk that the weights go to, or a temporary one for object storage."""
    if output.is_local:
        output.make_folder()
    parent = output.path if output.is_local else None
    with tempfile.TemporaryDirectory(prefix=".export-", dir=parent) as folder:
        yield Path(folder)
