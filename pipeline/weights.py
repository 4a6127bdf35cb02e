"""Trained weights: finding the folder, naming its content, loading it, and whose tokenizer it has.

Weights are a `from_pretrained` folder: `config.json`, safetensors and the tokenizer's files.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import Artifact, digest
from pipeline.cluster import scratch_folder
from pipeline.errors import UserError, first_line
from pipeline.storage import Location, local_copy

if TYPE_CHECKING:
    import torch

    from della_model import Della, DellaConfig
    from pipeline.shards import Dataset

BEST = "weights/best"
# Keys of config.json that say where and by what it was written, not what the model computes.
_NOT_CONTENT = ("_name_or_path", "transformers_version")


def resolve_weights(folder: Location) -> Location:
    """Find the `from_pretrained` folder that `weights=FOLDER` means.

    A training artifact means its best weights, a search those of its best trial, an export those
    that it made; a `from_pretrained` folder means itself.

    Raises:
        UserError: if the folder is neither, or its training has left no weights yet.
    """
    artifact = Artifact.find(folder)
    if artifact is not None and artifact.stage in ("train", "tune"):
        best = folder / BEST
        if not (best / "config.json").is_file():
            raise UserError(
                f"weights={folder} is a {artifact.stage} run ({artifact.status}) without {BEST}: "
                "expected weights that its validation has saved; run its command again first."
            )
        return best
    if artifact is not None and artifact.stage == "export":
        return folder / "weights"
    if artifact is not None:
        raise UserError(
            f"weights={folder} is the artifact of the stage {artifact.stage}: expected one of "
            "train, tune or export, or a from_pretrained folder; give what jobs/train.py printed."
        )
    if not (folder / "config.json").is_file():
        inner = next((n for n in ("best", "last") if (folder / n / "config.json").is_file()), None)
        remedy = f"give {folder / inner}." if inner else "check the path."
        raise UserError(
            f"weights={folder} holds no config.json: expected the artifact of a train stage or a "
            f"from_pretrained folder; {remedy}"
        )
    return folder


def fingerprint_weights(folder: Location) -> str:
    """Name weights by content: sha256, in hex, over the config, the index and the safetensors.

    Raises:
        UserError: if the folder holds no weights.
    """
    folder = resolve_weights(folder)
    config = _read_config(folder)
    files = _weight_files(folder)
    content: dict[str, Any] = {
        "config": json.dumps(
            {key: value for key, value in config.items() if key not in _NOT_CONTENT},
            sort_keys=True,
        )
    }
    for file in files:
        content[file.name] = file.sha256()
    return digest(content)


def load_config(folder: Location) -> DellaConfig:
    """Read the model's configuration, without its weights.

    Raises:
        UserError: if the folder holds another kind of model, or a config that cannot be used.
    """
    from della_model import ConfigError, DellaConfig

    folder = resolve_weights(folder)
    values = _read_config(folder)
    model_type = values.get("model_type")
    if model_type != DellaConfig.model_type:
        raise UserError(
            f"{folder} holds a model of type '{model_type}': expected 'della', which has latents; "
            "train one with jobs/train.py (model.backbone=FOLDER starts from a pretrained decoder)."
        )
    try:
        config: DellaConfig = DellaConfig.from_dict(values)
    except ConfigError as error:
        raise UserError(f"{folder / 'config.json'} cannot be used: {error}") from None
    return config


def load_model(folder: Location, device: torch.device | str = "cpu") -> Della:
    """Load weights for evaluation, in float32, on `device`.

    Args:
        folder: a training artifact or a `from_pretrained` folder.
        device: where the model computes.

    Raises:
        UserError: if the folder holds another kind of model, its weights do not fit its config, or
            some of them are NaN or infinite.
    """
    import torch

    from della_model import Della

    folder = resolve_weights(folder)
    load_config(folder)
    _weight_files(folder)
    try:
        with _quiet():
            model, loading = Della.from_pretrained(
                local_folder(folder), dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # safetensors raises a bare Exception of its own
        raise UserError(
            f"{folder} cannot be loaded ({first_line(error)}): its config and safetensors are "
            "damaged or do not fit each other; train again, or give another folder."
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the model's weights (the first is {missing[0]}): "
            "they would be random, and so would every figure; train again, or give another folder."
        )
    _require_finite(model, folder)
    loaded: Della = model.to(device).eval()
    return loaded


def load_weights_tokenizer(folder: Location) -> Any:
    """Load the tokenizer that lies beside the weights.

    Raises:
        UserError: if there is none.
    """
    from pipeline.tokenization import load_tokenizer

    return load_tokenizer(resolve_weights(folder))


def check_tokenizer(weights: Location, dataset: Dataset) -> None:
    """Check that a dataset's token ids mean what they meant in training.

    Raises:
        UserError: if the dataset was made by another tokenizer than the weights'.
    """
    from pipeline.tokenization import fingerprint_tokenizer

    expected = fingerprint_tokenizer(load_weights_tokenizer(weights))
    got = dataset.tokenizer_fingerprint
    if expected != got:
        raise UserError(
            f"the dataset was made by another tokenizer than the weights': expected {expected[:12]}"
            f" (beside the weights {weights}), got {got[:12]}: its token ids would mean other "
            "words to the model; preprocess the texts with tokenizer=hf and tokenizer.path= the "
            "folder of these weights."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bar that transformers shows while it loads: it would break into ours."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def _read_config(folder: Location) -> dict[str, Any]:
    config = (folder / "config.json").read_json()
    if not isinstance(config, dict):
        raise UserError(
            f"{folder / 'config.json'} holds no table of settings: it was damaged; "
            "restore it, or give another folder."
        )
    return config


def _weight_files(folder: Location) -> list[Location]:
    """Safetensors and their index, by name."""
    files = [
        file
        for file in folder.children()
        if file.name.endswith((".safetensors", ".safetensors.index.json"))
    ]
    if not any(file.name.endswith(".safetensors") for file in files):
        raise UserError(
            f"{folder} holds no *.safetensors beside its config.json: expected weights in that "
            "format; save them with save_pretrained, or give another folder."
        )
    return files


def local_folder(folder: Location) -> Path:
    """The folder on this machine; a remote one is copied once, whoever asks at the same time."""
    if folder.is_local:
        return Path(folder.path)
    infos = [file.info() for file in folder.children()]
    state = {info.path: [info.size, info.mtime_ns or 0] for info in infos}
    copy = scratch_folder() / f"weights-{digest([str(folder), state])[:16]}"
    if not copy.is_dir():
        partial = scratch_folder() / f"partial-{uuid.uuid4().hex}"
        fetched = local_copy(folder, partial)
        try:
            fetched.rename(copy)
        except OSError:  # another process of this node was first
            if not copy.is_dir():
                raise
    return copy


def _require_finite(model: Della, folder: Location) -> None:
    import torch

    tensors = [*model.named_parameters(), *model.named_buffers()]
    bad = [name for name, value in tensors if not bool(torch.isfinite(value).all())]
    if bad:
        raise UserError(
            f"{folder} holds NaN or infinite weights ({len(bad)} tensors, the first is {bad[0]}): "
            "every figure would be NaN; the training diverged: lower train.learning_rate and train "
            "again, or give an earlier checkpoint's weights."
        )
