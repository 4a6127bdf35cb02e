"""Weights as a `from_pretrained` folder, in place all at once."""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from della_model import Della
from pipeline.specs import TrainSpec
from pipeline.storage import Location
from pipeline.training.engine import full_tensor, persistent_buffers
from pipeline.training.trainable import adapter_config, low_rank_updates

# Bytes of one file of weights: what the writing rank holds at most beside its own share.
FILE_BYTES = 2 << 30
ADAPTER = "adapter"
_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_BASE_LAYER = ".base_layer"
# Gives one parameter whole, in float32 on the CPU; None on ranks that keep none.
Whole = Callable[[nn.Parameter], torch.Tensor | None]


def export_weights(
    engine: Any, spec: TrainSpec, tokenizer: Location, target: Location, is_first: bool
) -> None:
    """Write weights and tokenizer files to `target`; every rank calls, the first one writes.

    Low-rank updates are merged into the weights, and lie beside them in `adapter/`, in peft's
    format for the plain backbone.
    """
    model: Della = engine.module.model
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tensors(whole_tensors(model, is_first), folder if is_first else None)
        write_adapter(
            model, spec, folder / ADAPTER if is_first else None, lambda p: full_tensor(p, is_first)
        )
        if not is_first:
            return
        save_configs(model, folder)
        tokenizer.download(folder)
        replace_folder(folder, target)


def whole_tensors(model: Della, on_this_rank: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's weights in float32 on the CPU, one at a time, from whatever ZeRO stage.

    Names and values are those of a model without low-rank updates, which are merged. A collective
    call: every rank must run through it; ranks other than `on_this_rank` yield nothing. Tied
    weights come once.
    """
    yield from merged_tensors(model, lambda parameter: full_tensor(parameter, on_this_rank))
    if on_this_rank:
        for name, buffer in persistent_buffers(model):
            yield name, buffer.cpu().clone()


def merged_tensors(model: Della, whole: Whole) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's parameters as `whole` gives them, low-rank updates merged; tied ones once."""
    updates = {id(update.weight): update for update in low_rank_updates(model)}
    parts = {id(part) for update in updates.values() for part in (update.a, update.b)}
    for name, parameter in model.named_parameters():
        if id(parameter) in parts:
            continue
        update = updates.get(id(parameter))
        full = whole(parameter)
        if update is not None:
            a, b = whole(update.a), whole(update.b)
            full = None if full is None else update.merged(full, a, b)
        if full is not None:
            yield name.replace(_BASE_LAYER, ""), full


def write_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]],
    folder: Path | None,
    stem: str = "model",
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write safetensors, in several files with an index where one would be too big.

    Without a folder the tensors are only run through.
    """
    held: dict[str, torch.Tensor] = {}
    files: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        nonlocal held, size
        if folder is not None and held:
            save_file(held, folder / f"{len(files)}.part", metadata={"format": "pt"})
            files.append(list(held))
        held, size = {}, 0

    for name, tensor in tensors:
        if size + tensor.nbytes > file_bytes:
            flush()
        held[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if folder is None:
        return
    if len(files) == 1:
        (folder / "0.part").rename(folder / f"{stem}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"{stem}-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2))


def write_adapter(model: Della, spec: TrainSpec, folder: Path | None, whole: Whole) -> None:
    """Write the low-rank updates as peft does; nothing where there are none.

    Every rank runs through it; those without a folder write nothing.
    """
    found: dict[str, torch.Tensor] = {}
    for update in low_rank_updates(model.backbone):
        for kind, part in (("lora_A", update.a), ("lora_B", update.b)):
            full = whole(part)
            if full is not None:
                found[f"base_model.model.{update.name}.{kind}.weight"] = full
    if folder is None or not found:
        return
    folder.mkdir()
    save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = adapter_config(model, spec.train, spec.model.backbone)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, default=str))


def save_configs(model: Della, folder: Path) -> None:
    """Write `config.json` and `generation_config.json`."""
    config = model.config
    saved = config.dtype, config.architectures
    config.dtype, config.architectures = torch.float32, [type(model).__name__]
    try:
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    finally:
        config.dtype, config.architectures = saved


def replace_folder(folder: Path, target: Location) -> None:
    """Put a local folder's files in `target`'s place; a reader never sees half of them as whole.

    On a file system the new folder is moved in. On object storage, which moves nothing, config.json
    is taken away first and comes last: without it, a folder holds no weights.
    """
    if target.is_local:
        staged = target.parent / f".{target.name}-{uuid.uuid4().hex[:8]}"
        staged.upload(folder)
        target.delete()
        staged.move_to(target)
        return
    (target / _CONFIG).delete()
    files = (file for file in folder.rglob("*") if file.is_file())
    for file in sorted(files, key=lambda file: file.name == _CONFIG):
        (target / str(file.relative_to(folder))).write_bytes(file.read_bytes())


def copy_weights(source: Location, target: Location) -> None:
    """Copy exported weights within the storage."""
    with tempfile.TemporaryDirectory() as scratch:
        replace_folder(source.download(Path(scratch) / "weights"), target)
