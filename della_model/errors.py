"""Errors a user can mend. Each message says what was expected, what came, why, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(ValueError):
    """A setting of the model, of a size or of a schedule that cannot be used."""


class InputError(ValueError):
    """Tensors handed to the model that do not fit it."""


def unknown_name(what: str, name: object, known: Iterable[str], remedy: str = "") -> str:
    """The sentence for a name that is not among the known ones; it names the nearest."""
    names = sorted(known)
    near = get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    remedy = f" {remedy}" if remedy else ""
    return f"{what}: expected one of {', '.join(names)}, got {name!r}.{hint}{remedy}"
