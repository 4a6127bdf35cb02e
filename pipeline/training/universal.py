"""A checkpoint made readable for another number of workers, by DeepSpeed's own converter."""

from __future__ import annotations

import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

from pipeline.lease import held
from pipeline.storage import Location
from pipeline.training.safe_reading import no_code_from_files
from pipeline.training.store import (
    Manifest,
    TornCheckpointError,
    check_sizes,
    stored_folder,
    verified,
)

UNIVERSAL = "universal"  # the folder, and DeepSpeed's tag for it
_MANIFEST = "universal.json"  # written last


def universal_manifest(checkpoint: Location) -> Manifest:
    """The manifest of a checkpoint's conversion.

    Raises:
        TornCheckpointError: if it was never converted, or not to the end, or is damaged.
    """
    manifest = Manifest.load(checkpoint / _MANIFEST)
    check_sizes(checkpoint, manifest.files)
    return manifest


def convert_once(
    checkpoint: Location, manifest: Manifest, tag: str, say: Callable[[str], None]
) -> None:
    """Convert a checkpoint and keep the result in its folder, unless it is there already.

    Args:
        checkpoint: its folder.
        manifest: what it holds.
        tag: the folder in it that DeepSpeed wrote.
        say: hears that it is converted.

    Raises:
        TornCheckpointError: if a file of the checkpoint is damaged.
        UserError: if a file of it names code; none of it is run.
    """

    def ignore() -> None:  # a lost lease costs no more than the conversion being made twice
        return

    with held(
        checkpoint,
        progress=lambda: {"what": "convert"},
        on_wait=lambda claim: say(f"{claim.holder} is converting {checkpoint}; waiting for it"),
        on_cancel=ignore,
        on_lost=ignore,
    ):
        if _is_there(checkpoint):
            return
        say(f"converting {checkpoint}, of {manifest.world_size} workers, for another number")
        with tempfile.TemporaryDirectory(prefix="universal-") as scratch:
            local = verified(checkpoint, manifest.files, Path(scratch) / "source")
            target = Path(scratch) / "converted" / UNIVERSAL
            _convert(local / tag, target)
            (checkpoint / UNIVERSAL).delete()
            files = stored_folder(target.parent, checkpoint)
        replace(manifest, files=files).save(checkpoint / _MANIFEST)


def _is_there(checkpoint: Location) -> bool:
    try:
        universal_manifest(checkpoint)
    except TornCheckpointError:
        return False
    return True


def _convert(source: Path, target: Path) -> None:
    import torch.utils.serialization
    from deepspeed.checkpoint import ds_to_universal

    target.mkdir(parents=True)
    # One process: more would each import torch, for files that are copied and little else.
    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=False,  # parameters that are not trained have no optimizer state to check
        inject_missing_state=True,
    )
    with (
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
        no_code_from_files(source),
        # Mapped, not read: a rank's file holds its share of the model and of both moments.
        torch.utils.serialization.config.patch("load.mmap", True),  # type: ignore[attr-defined]
    ):
        ds_to_universal.main(arguments)
    (target.parent / "latest_universal").unlink(missing_ok=True)
    shutil.rmtree(target / "tmp", ignore_errors=True)
