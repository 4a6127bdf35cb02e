"""Errors that reach the user as one clear sentence, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar


class UserError(Exception):
    """Something the user can put right: the message says expected, got, why and what to do.

    The jobs print the message and exit with 2; any other exception is a failure of ours, shows its
    traceback and exits with 1.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[type[UserError], tuple[str]]:
        """Ray ships errors between processes by pickling them."""
        return (type(self), (self.message,))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the choice most like `word`, or "" when none is like it."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean '{found[0]}'?)" if found else ""


_E = TypeVar("_E", bound=BaseException)


def user_error_within(error: BaseException | None) -> UserError | None:
    """Find the `UserError` that a worker raised inside the wrappers that Ray puts around it."""
    return error_within(error, UserError)


def error_within(error: BaseException | None, kind: type[_E]) -> _E | None:
    """Find an error of a kind inside the wrappers that Ray puts around it.

    Ray nests the original in `cause` (RayTaskError), in `worker_failures` (Ray Train V2) or in
    `__cause__`; the search follows all three.
    """
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, kind):
            return current
        pending += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        failures = getattr(current, "worker_failures", None)
        if isinstance(failures, dict):
            pending += [e for e in failures.values() if isinstance(e, BaseException)]
        for name in ("error", "training_failed_error", "controller_failure"):
            inner = getattr(current, name, None)
            if isinstance(inner, BaseException):
                pending.append(inner)
    return None
