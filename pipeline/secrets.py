"""Keeping passwords, keys and tokens out of records and logs.

Two kinds are recognised wherever they stand in a text: credentials within a URI, and the values of
environment variables whose names say that they are secret.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar

MASK = "***"
_SHORTEST = 8  # a shorter value would be found in innocent words
_NAMES = re.compile(r"SECRET|TOKEN|PASSW(OR)?D|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.I)
# A variable that says where a secret lies, or how it is used, is none itself.
_NO_SECRETS = re.compile(r"(_PATH|_FILE|_DIR|_MODE|_URL|_PARALLELISM)$", re.I)
_USER_INFO = re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s@'\"]+@")
_QUERY = re.compile(
    r"(?P<name>[?&](?:[\w-]*(?:secret|token|password|credential|access_?key|signature)[\w-]*|sig)=)"
    r"[^&\s'\"]+",
    re.I,
)
Value = TypeVar("Value")


def redacted(value: Value) -> Value:
    """A plain value in which every text has `***` in place of what is secret."""
    hide = _secret_values()
    return _redacted(value, hide)


def has_credentials(uri: str) -> bool:
    """Whether a URI holds a user's name and password, or a key among its options."""
    return bool(_USER_INFO.search(uri) or _QUERY.search(uri))


def _secret_values() -> list[str]:
    """Values of secret environment variables, the longest first: one may hold another."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _NAMES.search(name) and not _NO_SECRETS.search(name)
    }
    return sorted(found, key=len, reverse=True)


def _redacted(value: Any, hide: list[str]) -> Any:
    if isinstance(value, str):
        text = _USER_INFO.sub(rf"\g<scheme>{MASK}@", value)
        text = _QUERY.sub(rf"\g<name>{MASK}", text)
        for secret in hide:
            text = text.replace(secret, MASK)
        return text
    if isinstance(value, Mapping):
        return {key: _redacted(item, hide) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_redacted(item, hide) for item in value])
    return value
