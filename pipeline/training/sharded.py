"""A pretrained backbone straight into ZeRO-3's shards: no worker ever holds the weights whole.

The model is made with parameters that take no memory. Then each is read from its safetensors file
on the first worker, sent to the others, cut, and all but a worker's own piece is dropped, before
the next one is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from della_model import Della, DellaConfig
from pipeline.noise import Purpose, torch_seed
from pipeline.training.process import joined_deepspeed

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WRAPPED = ".projection."


class WeightFiles:
    """The tensors of a `from_pretrained` folder's safetensors, read one at a time.

    Args:
        folder: a local folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if (folder / _INDEX).is_file():
            self.file_of = dict(json.loads((folder / _INDEX).read_text())["weight_map"])
        elif (folder / _SINGLE).is_file():
            with safe_open(folder / _SINGLE, "pt") as file:
                self.file_of = dict.fromkeys(file.keys(), _SINGLE)
        else:
            self.file_of = {}

    def shape(self, key: str) -> list[int]:
        """The shape of a tensor, which is not read."""
        with safe_open(self._folder / self.file_of[key], "pt") as file:
            shape: list[int] = file.get_slice(key).get_shape()
            return shape

    def read(self, key: str) -> torch.Tensor:
        """One tensor; its file is closed again, for what is mapped counts as held."""
        with safe_open(self._folder / self.file_of[key], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(key)
            return tensor.clone()


def load_sharded(
    config: DellaConfig, folder: Path, seed: int, deepspeed_config: dict[str, Any]
) -> Della | None:
    """Build a Della around the backbone in `folder`, sharded from the start.

    Returns None where that cannot be done: no safetensors, names that are not the backbone's own,
    or a vocabulary that is to be extended. A collective call: every worker makes it, and gets the
    same answer.
    """
    deepspeed = joined_deepspeed()
    files = WeightFiles(folder)
    with parameters_without_memory():
        model = Della(config)
    owners = _owners(model)
    keys = _keys(owners, model, files)
    if keys is None:
        return None
    dtype = torch.bfloat16 if deepspeed_config.get("bf16", {}).get("enabled") else torch.float32
    is_first = torch.distributed.get_rank() == 0
    shards = deepspeed.zero.Init(config_dict_or_path=deepspeed_config)
    for places, key in zip(owners, keys, strict=True):
        parameter = places[0].parameter
        whole = files.read(key) if is_first else torch.empty(parameter.shape)
        whole = whole.to(dtype)
        made = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        for owner in places:
            owner.module._parameters[owner.attribute] = made
        shards._convert_to_zero_parameters([made])
    for name, part in model.latent_parts():
        part.to_empty(device="cpu")
        start_part(name, part, seed)
        part.to(dtype)
        shards._convert_to_zero_parameters(list(part.parameters()))
    for name, buffer in model.named_buffers():
        if (own := _key(name, model, files)) is not None:
            buffer.copy_(files.read(own))
    return model


def start_part(name: str, part: nn.Module, seed: int) -> None:
    """Draw the starting weights of a part that exists for the latents.

    From a seed of its own, so that they do not depend on what was drawn before, hence not on how
    the model was built.
    """
    torch.manual_seed(torch_seed(seed, Purpose.START, *name.encode()))
    for child in part.modules():
        if child is not part and isinstance(child, nn.Linear | nn.LayerNorm):
            child.reset_parameters()
    part.reset_parameters()  # type: ignore[operator]


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Modules made while the body runs have parameters with a shape and no storage.

    Buffers are made as ever: some are computed and stand in no file. As accelerate's
    `init_empty_weights`, which makes two parameters of one that is tied.
    """
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Owner:
    """A place where a parameter stands; tied ones stand in several."""

    name: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter


def _owners(model: Della) -> list[list[_Owner]]:
    """The backbone's parameters, each with all of its places."""
    latent = {id(p) for _, part in model.latent_parts() for p in part.parameters()}
    found: dict[int, list[_Owner]] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in latent:
                name = f"{prefix}.{attribute}"
                owner = _Owner(name, module, attribute, parameter)
                found.setdefault(id(parameter), []).append(owner)
    return list(found.values())


def _keys(owners: list[list[_Owner]], model: Della, files: WeightFiles) -> list[str] | None:
    """What each parameter is called in the files; None where one is not there."""
    keys = []
    for places in owners:
        found = (_key(owner.name, model, files) for owner in places)
        key = next((key for key in found if key is not None), None)
        if key is None or files.shape(key) != list(places[0].parameter.shape):
            return None
        keys.append(key)
    return keys


def _key(name: str, model: Della, files: WeightFiles) -> str | None:
    """The name in the files of a tensor of the model."""
    own = name.removeprefix("backbone.").replace(_WRAPPED, ".")
    if name.startswith("encoder."):  # a second one, which starts as the backbone's own
        encoder = model.config.adapter.encoder(model.backbone)
        inside = next(n for n, module in model.backbone.named_modules() if module is encoder)
        own = f"{inside}.{name.removeprefix('encoder.')}"
    # Published files of some families leave the language model's prefix out.
    short = own.removeprefix(f"{model.backbone.base_model_prefix}.")
    return next((key for key in (own, short) if key in files.file_of), None)
