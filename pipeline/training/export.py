"""Weights as a `from_pretrained` folder, in place all at once."""

from __future__ import annotations

import copy
import tempfile
import uuid
from pathlib import Path
from typing import Any

import torch

from della_model import Della
from pipeline.storage import Location
from pipeline.training.engine import full_state_dict

_CONFIG = "config.json"


def export_weights(engine: Any, tokenizer: Location, target: Location, is_first: bool) -> None:
    """Write weights and tokenizer files to `target`; every rank calls, the first one writes."""
    state = full_state_dict(engine, is_first)
    if not is_first:
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer.download(folder)
        save_pretrained(engine.module.model, state, folder)
        replace_folder(folder, target)


def save_pretrained(model: Della, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write config and safetensors; shared weights are written once."""
    saved_dtype = model.config.dtype
    model.config.dtype = torch.float32
    try:
        # A tied head has no entry of its own in `named_parameters`; saving drops it anyway.
        model.save_pretrained(folder, state_dict=copy.copy(state))
    finally:
        model.config.dtype = saved_dtype


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
    for file in sorted(folder.iterdir(), key=lambda file: file.name == _CONFIG):
        (target / file.name).write_bytes(file.read_bytes())


def copy_weights(source: Location, target: Location) -> None:
    """Copy exported weights within the storage."""
    with tempfile.TemporaryDirectory() as scratch:
        replace_folder(source.download(Path(scratch) / "weights"), target)
