"""What an evaluation prints at its end: figures with their errors, then texts."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.evaluation.figures import LABELS, collapse, shown


def print_evaluation(figures: dict[str, Any], console: Console) -> None:
    """Print the figures as a table, then samples and reconstructions as lists."""
    console.print(_table(figures))
    console.print(_layers(figures))
    counts = "  ".join(
        f"{figures[f'num_{name}']:,} {name}" for name in ("documents", "tokens", "words")
    )
    console.print(f"{counts} ({figures['iw_samples']} importance samples a document)")
    sentence = collapse(figures)
    if sentence is not None:
        console.print(Text(sentence, style="bold yellow"))
    if figures["samples"]:
        console.print("\nSampled from the prior:", style="bold")
        for number, text in enumerate(figures["samples"], start=1):
            console.print(Text(f"{number:3d}. {text or '(empty)'}"), soft_wrap=True)
    if figures["reconstructions"]:
        console.print("\nReconstructed through the posterior's mean:", style="bold")
        for pair in figures["reconstructions"]:
            console.print(Text(f"   source  {pair['source']}"), soft_wrap=True)
            console.print(
                Text(f"        →  {pair['reconstruction'] or '(empty)'}\n"), soft_wrap=True
            )


def _table(figures: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("± s.e.", justify="right")
    table.add_column("unit")
    errors = figures["standard_errors"]
    for name, label in LABELS.items():
        value, error = shown(figures[name], errors[name])
        table.add_row(label.title, value, error, label.unit)
    return table


def _layers(figures: dict[str, Any]) -> Table:
    """KL and active units of each latent layer."""
    active, errors = figures["active_units"], figures["standard_errors"]["kl_per_layer"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for title in ("layer", "KL, nats/document", "± s.e."):
        table.add_column(title, justify="right")
    for bound in active:
        table.add_column(f"units above {bound}, of {figures['latent_size']}", justify="right")
    for layer, value in enumerate(figures["kl_per_layer"]):
        units = (str(counts[layer]) for counts in active.values())
        table.add_row(str(layer), *shown(value, errors[layer]), *units)
    return table
