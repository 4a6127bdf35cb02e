"""The end of preprocess: the manifest that commits a dataset, and what is said about it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.artifact import versions
from pipeline.corpora.index import CorpusIndex
from pipeline.corpora.writing import REJECTED, UNITS, Recipe, UnitRecord
from pipeline.shards import CHECKSUM, FORMAT, MANIFEST, SPLITS, checksum_of
from pipeline.storage import Location


def commit(
    index: CorpusIndex, recipe: Recipe, about_tokenizer: dict[str, Any], records: list[UnitRecord]
) -> dict[str, Any]:
    """Write the manifest, which makes the dataset one, then clear away what it does not name."""
    splits: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        parts = [record.parts[split] for record in records if split in record.parts]
        if parts:
            documents = sum(part["documents"] for part in parts)
            tokens = sum(part["tokens"] for part in parts)
            splits[split] = {
                "documents": documents,
                "tokens": tokens,
                "predicted_tokens": tokens - documents,
                "words": sum(part["words"] for part in parts),
                "max_length": max(part["max_length"] for part in parts),
                "parts": parts,
            }
            if "condition_tokens" in parts[0]:
                splits[split]["condition_tokens"] = sum(p["condition_tokens"] for p in parts)
                splits[split]["max_condition_length"] = max(
                    p["max_condition_length"] for p in parts
                )
    rejected: dict[str, int] = {}
    for record in records:
        for reason, count in record.rejected.items():
            rejected[reason] = rejected.get(reason, 0) + count
    manifest = {
        "format": FORMAT,
        "inputs": [asdict(file) for file in index.files],
        "tokenizer": about_tokenizer,
        "splits": splits,
        "blank": sum(record.blank for record in records),
        "rejected": rejected,
        "rejected_files": [r.rejected_file for r in records if r.rejected_file],
        "versions": versions(),
    }
    manifest[CHECKSUM] = checksum_of(manifest)
    (recipe.output / MANIFEST).write_json(manifest)
    clear_leftovers(manifest, recipe.output)
    return manifest


def clear_leftovers(manifest: dict[str, Any], output: Location) -> None:
    """Delete what runs cut short left behind, and the records that the manifest replaces."""
    named = {part["file"] for split in manifest["splits"].values() for part in split["parts"]}
    named |= set(manifest["rejected_files"])
    for folder in (*SPLITS, REJECTED):
        for file in (output / folder).children():
            if f"{folder}/{file.name}" not in named:
                file.delete()
    for place in (output, output / "tokenizer"):  # files that were being written
        for file in place.children():
            if file.name.endswith(".tmp"):
                file.delete()
    (output / UNITS).delete()


_FIGURES = (
    "documents", "tokens", "words", "max_length", "condition_tokens", "max_condition_length",
)  # fmt: skip


def figures_of(
    manifest: dict[str, Any], rows_per_s: float | None, tokens_per_s: float | None
) -> dict[str, Any]:
    """The figures of the stage's record, out of a manifest."""
    splits = {
        name: {key: split[key] for key in _FIGURES if key in split}
        for name, split in manifest["splits"].items()
    }
    return {
        **splits,
        "rejected": manifest["rejected"],
        "blank": manifest["blank"],
        "vocab_size": manifest["tokenizer"]["vocab_size"],
        "rows_per_s": None if rows_per_s is None else round(rows_per_s, 1),
        "tokens_per_s": None if tokens_per_s is None else round(tokens_per_s, 1),
    }


def print_table(console: Console, manifest: dict[str, Any]) -> None:
    """Show what became of the corpus."""
    columns = {"documents": "documents", "tokens": "tokens", "words": "words",
               "max_length": "longest"}  # fmt: skip
    if any("condition_tokens" in split for split in manifest["splits"].values()):
        columns |= {"condition_tokens": "source tokens", "max_condition_length": "longest source"}
    table = Table("split", *columns.values(), title="dataset")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, split in manifest["splits"].items():
        table.add_row(name, *(f"{split[key]:,}" for key in columns))
    rejected = manifest["rejected"]
    table.add_section()
    table.add_row("rejected", f"{sum(rejected.values()):,}")
    for reason, count in sorted(rejected.items(), key=lambda item: -item[1]):
        table.add_row(f"  {reason}", f"{count:,}")
    table.add_row("blank lines", f"{manifest['blank']:,}")
    console.print(table)
