"""What an evaluation prints at its end: figures with their errors, then texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.evaluation.figures import LABELS, collapse, shown

TEXT_LABELS = {
    "bleu": "BLEU",
    "self_bleu": "Self-BLEU",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "jaccard_1": "Jaccard of 1-grams",
    "jaccard_2": "Jaccard of 2-grams",
    "jaccard_3": "Jaccard of 3-grams",
    "divergence_1": "Divergence of 1-grams, nats",
    "divergence_2": "Divergence of 2-grams, nats",
    "divergence_3": "Divergence of 3-grams, nats",
    "reference_ppl": "Perplexity under the reference model",
    "mauve": "MAUVE",
    "exact_match": "Exact match",
    "edit_distance": "Edit distance, share of words",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "bertscore": "BERTScore F1",
}


def print_evaluation(figures: Mapping[str, Any], console: Console) -> None:
    """Print the figures as tables, then samples and reconstructions as lists."""
    console.print(_table(figures))
    if figures["kl_per_layer"]:
        console.print(_layers(figures))
    counts = "  ".join(
        f"{figures[f'num_{name}']:,} {name}" for name in ("documents", "tokens", "words")
    )
    console.print(f"{counts} ({figures['iw_samples']} importance samples a document)")
    for sentence in (collapse(figures), figures.get("aggregate_posterior", {}).get("sentence")):
        if sentence is not None:
            console.print(Text(sentence, style="bold yellow"))
    _print_text_figures(figures, console)
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


def _table(figures: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("± s.e.", justify="right")
    table.add_column("unit")
    errors = figures["standard_errors"]
    for name, label in LABELS.items():
        if name in figures:
            value, error = shown(figures[name], errors[name])
            table.add_row(label.title, value, error, label.unit)
    return table


def _layers(figures: Mapping[str, Any]) -> Table:
    """KL, active units and reach of each latent layer."""
    active, errors = figures["active_units"], figures["standard_errors"]["kl_per_layer"]
    probe = figures.get("probe")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for title in ("layer", "KL, nats/document", "± s.e."):
        table.add_column(title, justify="right")
    for bound in active:
        table.add_column(f"units above {bound}, of {figures['latent_size']}", justify="right")
    if probe:
        table.add_column("swapped, nats/token", justify="right")
    for layer, value in enumerate(figures["kl_per_layer"]):
        cells = [str(counts[layer]) for counts in active.values()]
        if probe:
            row = probe["layers"][layer]
            cells.append(shown(row["token_kl"], row["token_kl_error"])[0])
        table.add_row(str(layer), *shown(value, errors[layer]), *cells)
    return table


def _print_text_figures(figures: Mapping[str, Any], console: Console) -> None:
    """Texts' figures: samples beside real documents, then reconstructions."""
    generation = figures.get("generation", {})
    columns = [name for name in ("samples", "real") if name in generation]
    if columns:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        table.add_column(f"of {generation['num_samples']} texts")
        titles = {"samples": "samples", "real": "real documents"}
        for name in columns:
            table.add_column(titles[name], justify="right")
        for key, title in TEXT_LABELS.items():
            if key in generation[columns[0]]:
                cells = (shown(generation[name].get(key), None)[0] for name in columns)
                table.add_row(title, *cells)
        console.print(table)
    made = figures.get("reconstruction")
    if made:
        line = ", ".join(
            f"{TEXT_LABELS[key]} {shown(made[key], None)[0]}"
            for key in ("bleu", "exact_match", "edit_distance")
        )
        console.print(f"{made['num_documents']} reconstructions: {line}")
