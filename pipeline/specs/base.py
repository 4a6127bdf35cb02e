"""Typed, frozen specs: validated when built, and the source of a stage's identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import UserError, nearest


class NotIdentity:
    """Marks a spec field that changes where or how fast a stage runs, but not what it computes.

    `Annotated[int, NotIdentity]` keeps the field out of `Spec.identity`, hence out of the
    fingerprint: a path (its content is an input of its own), a worker count, a verbosity.
    """


class Spec(BaseModel):
    """A frozen record that refuses unknown keys and wrong types with one clear sentence."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @classmethod
    def build(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """Build the spec from plain values.

        Raises:
            UserError: naming the first key that is unknown (with the nearest right name), missing
                or of the wrong type or range.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise UserError(_sentence(cls, error.errors()[0], where)) from None

    def identity(self) -> dict[str, Any]:
        """Return what of this spec decides the result, as plain JSON values."""
        identity: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if NotIdentity in field.metadata:
                continue
            value = getattr(self, name)
            plain = self.model_dump(mode="json", include={name})[name]
            identity[name] = value.identity() if isinstance(value, Spec) else plain
        return identity


def _sentence(cls: type[Spec], error: ErrorDetails, where: str) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        owner = _owner(cls, location[:-1])
        right = nearest(location[-1], owner.model_fields)
        known = ", ".join(owner.model_fields)
        return f"{where}: unknown key '{key}'{right}; the keys there are: {known}."
    if error["type"] == "missing":
        return f"{where}: '{key}' has no value, but it is needed; set {key}=..."
    got = error.get("input")
    if error["type"] in ("literal_error", "enum"):
        choices = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        right = nearest(str(got), choices)
        return f"{where}: {key}={got!r} is not one of {', '.join(choices)}{right}."
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {key + ': ' if key else ''}{message}"
    return f"{where}: {key}={got!r} is refused: {message[0].lower()}{message[1:]}."


def _owner(cls: type[Spec], path: list[str]) -> type[Spec]:
    """Follow `path` from `cls` to the spec class that owns the last key."""
    for part in path:
        field = cls.model_fields.get(part)
        if field is None:
            continue
        candidates = [field.annotation, *get_args(field.annotation)]
        for candidate in candidates:
            if isinstance(candidate, type) and issubclass(candidate, Spec):
                cls = candidate
                break
    return cls
