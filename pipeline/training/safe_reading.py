"""DeepSpeed's files read without running code from them.

They are pickles, and a pickle may name any function to be called as it is read. Here only tensors,
plain values and the few record classes of DeepSpeed's own pass; anything else ends the reading.
"""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from pipeline.environment import environment_variable
from pipeline.errors import UserError, first_line

# Plain records without code of their own, which DeepSpeed 0.19 writes beside its tensors.
_RECORDS = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


class _Record:
    """Stands for a class of DeepSpeed's, so that reading a file does not need DeepSpeed."""

    def __new__(cls, *_: Any) -> _Record:
        return super().__new__(cls)


def read_tensors(file: Path) -> dict[str, Any]:
    """Read one of DeepSpeed's files; its tensors are mapped, not read, until they are used.

    Raises:
        UserError: if it is damaged, or names code that is none of DeepSpeed's records.
    """
    records: list[Any] = [(type(name, (_Record,), {}), name) for name in _RECORDS]
    try:
        with _blamed(file), torch.serialization.safe_globals(records):
            content: dict[str, Any] = torch.load(
                file, map_location="cpu", mmap=True, weights_only=True
            )
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(
            f"{file} cannot be read ({first_line(error)[:160]}): it is truncated or damaged, so "
            "the weights in it are lost; give another checkpoint."
        ) from None
    return content


def write_enums_by_value() -> None:
    """Have what this process pickles name DeepSpeed's stages of ZeRO by their value.

    Python 3.11.2 names `getattr` for a member of an enum (3.11.7 does not), which no reader can
    allow: with it a file reaches any attribute of what it may name.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    copyreg.pickle(ZeroStageEnum, _by_value)


def _by_value(stage: Any) -> tuple[Any, ...]:
    return type(stage), (stage.value,)


@contextmanager
def no_code_from_files(where: Path) -> Iterator[None]:
    """Have every `torch.load` of the body read tensors and plain records alone.

    DeepSpeed passes `weights_only=False` wherever it reads a checkpoint; torch's own switch in the
    environment outranks that.

    Args:
        where: the folder that is read, for the sentence.

    Raises:
        UserError: if a file there names other code; none of it has run.
    """
    classes = []
    for name in _RECORDS:
        module, _, attribute = name.rpartition(".")
        classes.append(getattr(import_module(module), attribute))
    write_enums_by_value()  # a conversion writes what it read
    with (
        environment_variable("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1"),
        _blamed(where),
        torch.serialization.safe_globals(classes),
    ):
        yield


@contextmanager
def _blamed(where: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{where} is refused: a checkpoint holds tensors and plain records, but this names "
            f"something else or is damaged ({_named(reason)}); nothing of it was run; give a "
            "checkpoint that your own training wrote, or an earlier one."
        ) from None


def _named(reason: str) -> str:
    """The part of torch's long explanation that names what is wrong."""
    for start in ("Unsupported global: ", "Unsupported operand ", "Unsupported class "):
        if start in reason:
            return start + reason.split(start, 1)[1].split(" was not", 1)[0].split(". ", 1)[0][:120]
    return reason[:160]
