"""What a checkpoint says of its model, so that weights can be made of it without its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.errors import UserError
from pipeline.secrets import redacted
from pipeline.specs import TrainSpec
from pipeline.storage import Location
from pipeline.training.export import save_configs
from pipeline.training.trainable import set_trainable

if TYPE_CHECKING:
    from della_model import Della

FOLDER = "model"  # of a checkpoint: configuration and tokenizer, as beside the weights
SPEC = "train_spec.json"


def describe_model(model: Della, spec: TrainSpec, tokenizer: Location, checkpoint: Path) -> None:
    """Write the model's configuration and tokenizer, and the run's settings, into a checkpoint."""
    folder = checkpoint / FOLDER
    folder.mkdir()
    save_configs(model, folder)
    tokenizer.download(folder)
    settings = redacted(spec.model_dump(mode="json"))
    (checkpoint / SPEC).write_text(json.dumps(settings, indent=2, ensure_ascii=False))


def described_spec(checkpoint: Path) -> TrainSpec:
    """The settings of the run that wrote a checkpoint.

    Raises:
        UserError: if it does not say, or this version does not know them.
    """
    file = checkpoint / SPEC
    if not file.is_file() or not (checkpoint / FOLDER / "config.json").is_file():
        raise UserError(
            f"{checkpoint} does not say which model it is of ({SPEC} and {FOLDER}/ are missing): "
            "it was written before checkpoints did, or is torn; go on with its run for one more "
            "checkpoint (the same train command), or give another."
        )
    return TrainSpec.build(Location.parse(file).read_json(), str(file))


def described_model(checkpoint: Path, spec: TrainSpec) -> Della:
    """The model of a checkpoint as its run had it, without memory for its weights.

    Raises:
        UserError: if its configuration cannot be used.
    """
    from della_model import ConfigError, Della, DellaConfig

    file = checkpoint / FOLDER / "config.json"
    try:
        config = DellaConfig.from_dict(Location.parse(file).read_json())
        with torch.device("meta"):
            model = Della(config)
            set_trainable(model, spec.train)
    except ConfigError as error:
        raise UserError(f"{file} cannot be used: {error}") from None
    return model
