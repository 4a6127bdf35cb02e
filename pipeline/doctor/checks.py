"""What a check found, and the table of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

State = Literal["ok", "warning", "wrong"]
_COLOURS = {"ok": "green", "warning": "yellow", "wrong": "red"}


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    state: State
    found: str
    remedy: str = ""  # what to do, where it is not ok


def print_checks(console: Console, checks: list[Check]) -> None:
    """Show a line a check."""
    table = Table("check", "", "found", "what to do", title="doctor")
    for check in checks:
        colour = _COLOURS[check.state]
        table.add_row(check.name, f"[{colour}]{check.state}[/]", check.found, check.remedy)
    console.print(table)


def gigabytes(count: float) -> str:
    """Bytes for a person, in GB of 10⁹."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.0f} MB"
