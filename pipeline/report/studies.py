"""The content of a page over several studies: what each system costs on each corpus.

A study's page compares systems on one corpus; this sets the pages of several side by side, so that
one sees which of their differences hold on all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.artifact import versions
from pipeline.errors import UserError
from pipeline.storage import Location

_SHOWN = ("iw_nll", "kl", "mutual_information")  # of a study's columns, those set side by side

Page = Mapping[str, Any]


def build_studies(title: str, folders: Sequence[Location], pages: Sequence[Page]) -> dict[str, Any]:
    """Gather what the page over studies shows: differences from what all of them compare with.

    Args:
        title: the heading.
        folders: of each page, where it lies.
        pages: what the studies show, each as its `report.json` has it.

    Raises:
        UserError: if there is but one, one is not of a study, two have one title, or there is no
            system that all compare with.
    """
    _check(folders, pages)
    against = [base for base in pages[0]["against"] if all(base in p["against"] for p in pages)]
    if not against:
        each = "; ".join(f"{p['title']} with {', '.join(p['against'])}" for p in pages)
        raise UserError(
            f"studies compare their systems with no one system that is the same ({each}): expected "
            "one, whose differences stand side by side; make their pages again with against=[NAME]."
        )
    found = [{row["name"]: row for row in page["systems"]} for page in pages]
    names = list(dict.fromkeys(name for rows in found for name in rows))
    return {
        "kind": "studies",
        "title": title,
        "studies": [
            {key: page[key] for key in ("title", "split", "num_documents", "iw_samples")}
            for page in pages
        ],
        "against": against,
        "systems": [
            {
                "name": name,
                "on": [_on(rows.get(name), against, rows) for rows in found],
                "settings": _differing([rows[name] for rows in found if name in rows]),
            }
            for name in names
        ],
        "versions": {"report": versions()},
    }


def _check(folders: Sequence[Location], pages: Sequence[Page]) -> None:
    if len(pages) < 2:
        raise UserError(
            "studies names one page: expected several, of which each has its columns; give "
            "studies=[FOLDER,FOLDER]."
        )
    titles: dict[str, Location] = {}
    for folder, page in zip(folders, pages, strict=True):
        if page["kind"] != "study":
            raise UserError(
                f"studies holds {folder}, the page of a {page['kind']}: expected pages of studies, "
                "which compare systems by name; give the folders that jobs/report.py printed for "
                "runs=[...] names=[...], or a job of the study."
            )
        if (title := page["title"]) in titles:
            raise UserError(
                f"studies holds two pages with the title '{title}', {titles[title]} and {folder}: "
                "expected one of its own for each, which heads its columns; make one again with "
                "another title=, or leave one out."
            )
        titles[title] = folder


def _on(
    row: Mapping[str, Any] | None, against: Sequence[str], rows: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What one study has of a system; None where the system is not in it."""
    if row is None:
        return None
    return {
        "seeds": row["seeds"],
        "collapsed": row["collapsed"],
        **{name: row["cells"][name] for name in _SHOWN},
        "differences": {
            base: _in_percent(row["differences"][base], rows[base]["cells"]["iw_nll"]["value"])
            for base in against
            if base in row["differences"]
        },
    }


def _in_percent(difference: Mapping[str, Any] | None, base: float) -> dict[str, Any] | None:
    """A difference, with its error in percent of the other system's IW-NLL too."""
    if difference is None:
        return None
    error = difference["error"]
    return {**difference, "percent_error": None if error is None else 100 * error / base}


def _differing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings of a system, beside those of the first of its study, that differ between studies."""
    found = [row["settings"] for row in rows]
    keys = sorted({key for settings in found for key in settings})
    return [key for key in keys if any(one.get(key) != found[0].get(key) for one in found)]
