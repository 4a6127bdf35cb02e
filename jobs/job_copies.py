"""Stages of a job's file that stand for many: one for each system, each seed, each that they read.

    model:
      run: train
      settings: [${job.sizes.cpu}]              # tables of keys; the stage's own keys win over them
      each:
        system: {names: [a, b], of: ${job.known_systems}}  # named tables, that win over both
        train.seed: [0, 1, 2]                   # values of a key
    figures:
      run: evaluate
      weights: ${stage:model}                   # as many as `model` is
    page:
      runs: ['${stage:figures}']                # a list takes all of them
      names: ['${labels:figures}']              # what they are, without the values of keys

What a search found (`from_trial`) wins over `settings` and `each`, and loses to the stage's own
keys.
A copy is named after its stage and its values, `model-a-0`. A stage that reads one of many is as
many, each with the values of what it reads. With `when: false` a stage is left out, and so is a
`from_trial` that names it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import UserError, nearest

_EACH, _WHEN, _SETTINGS, _TRIAL = "each", "when", "settings", "from_trial"
_OWN = (_EACH, _WHEN, _SETTINGS)
_STAGE, _LABELS = "stage:", "labels:"

Entry = dict[str, Any]
Dimensions = dict[str, dict[str, Entry]]  # name -> value, as names show it -> what it sets


@dataclass(frozen=True)
class Copy:
    """One of those that a stage stands for; of most stages the only one."""

    stage: str  # its name in the file
    values: Mapping[str, str]  # of its dimensions
    entry: Any
    shared: frozenset[str] = frozenset()  # keys of its entry that `settings` and `each` gave it

    @property
    def name(self) -> str:
        """Its own name, by which others refer to it."""
        return _name(self.stage, self.values)

    @property
    def label(self) -> str:
        """Its values without those of keys, which it shares with its copies of other seeds."""
        return ", ".join(value for key, value in self.values.items() if "." not in key)


def copies(stages: Mapping[str, Any]) -> list[Copy]:
    """All stages of a job, in the order of its file.

    Raises:
        UserError: if a stage's `each`, `settings` or `when` cannot be read, with the stage's name.
    """
    kept = {
        name: entry
        for name, entry in stages.items()
        if not isinstance(entry, Mapping) or _switched_on(name, entry)
    }
    dropped = stages.keys() - kept.keys()
    found = {name: list(_copies(name, kept)) for name in kept}
    return [
        replace(copy, entry=_referring(copy, found, dropped))
        for of_stage in found.values()
        for copy in of_stage
    ]


def _switched_on(name: str, entry: Mapping[str, Any]) -> bool:
    when = entry.get(_WHEN, True)
    if not isinstance(when, bool):
        raise UserError(f"stage '{name}': when is true or false, got {when!r}.")
    return when


def _copies(name: str, stages: Mapping[str, Any]) -> Iterator[Copy]:
    entry = stages[name]
    if not isinstance(entry, Mapping):
        yield Copy(name, {}, entry)
        return
    base: Entry = {}
    for table in _tables(name, _SETTINGS, entry.get(_SETTINGS, [])):
        base |= table
    own = {key: value for key, value in entry.items() if key not in _OWN}
    base |= own
    dimensions = _dimensions(name, stages, ())
    for values in itertools.product(*dimensions.values()):
        chosen = dict(zip(dimensions, values, strict=True))
        of_each: Entry = {}
        for key, value in chosen.items():
            of_each |= dimensions[key][value]
        shared = (base.keys() - own.keys()) | of_each.keys()
        yield Copy(name, chosen, base | of_each, frozenset(shared))


def _dimensions(name: str, stages: Mapping[str, Any], path: tuple[str, ...]) -> Dimensions:
    """A stage's own, and those of what it reads; a cycle, which the graph will refuse, ends."""
    entry = stages.get(name)
    if not isinstance(entry, Mapping) or name in path:
        return {}
    each = entry.get(_EACH, {})
    if not isinstance(each, Mapping):
        raise UserError(f"stage '{name}': each is a table of dimensions, got {each!r}.")
    found = {str(key): _dimension(name, str(key), value) for key, value in each.items()}
    for read in _references(entry):
        for key, values in _dimensions(read, stages, (*path, name)).items():
            found.setdefault(key, {value: {} for value in values})
    return found


def _dimension(name: str, key: str, given: Any) -> dict[str, Entry]:
    if isinstance(given, list) and "." in key:
        return {str(value): {key: value} for value in given}
    if isinstance(given, Mapping) and given.keys() == {"names", "of"}:
        known: dict[str, Entry] = {}
        for table in _tables(name, f"each.{key}.of", given["of"]):
            for value, settings in table.items():
                known[value] = known.get(value, {}) | (settings or {})
        for value in given["names"]:
            if value not in known:
                raise UserError(
                    f"stage '{name}': {key}={value} is not there{nearest(str(value), known)}; "
                    f"{key} is one of: {', '.join(known)}."
                )
        return {value: known[value] for value in given["names"]}
    raise UserError(
        f"stage '{name}': each.{key} is a list of values, for a key with a dot, or a table "
        f"{{names: [NAME], of: TABLE}} whose entries are settings, got {given!r}."
    )


def _tables(name: str, key: str, given: Any) -> Sequence[Mapping[str, Any]]:
    tables = given if isinstance(given, list) else [given]
    for table in tables:
        if not isinstance(table, Mapping):
            raise UserError(f"stage '{name}': {key} is a table or a list of them, got {given!r}.")
    return tables


def _references(entry: Mapping[str, Any]) -> list[str]:
    """The stages that an entry reads one of."""
    return [
        value.removeprefix(_STAGE)
        for value in entry.values()
        if isinstance(value, str) and value.startswith(_STAGE)
    ]


def _referring(copy: Copy, found: Mapping[str, list[Copy]], dropped: set[str]) -> Any:
    """A copy's entry, in which references name copies."""
    if not isinstance(copy.entry, Mapping):
        return copy.entry
    entry = dict(copy.entry)
    if str(entry.get(_TRIAL)).removeprefix(_STAGE) in dropped:
        del entry[_TRIAL]
    for key, value in entry.items():
        if isinstance(value, str) and value.startswith(_STAGE):
            entry[key] = _STAGE + _one(value.removeprefix(_STAGE), copy, found)
        elif isinstance(value, list):
            entry[key] = [each for item in value for each in _all(item, found)]
    return entry


def _one(stage: str, copy: Copy, found: Mapping[str, list[Copy]]) -> str:
    there = found.get(stage)
    if not there:  # the graph will say so
        return stage
    return _name(stage, {key: copy.values[key] for key in there[0].values if key in copy.values})


def _all(item: Any, found: Mapping[str, list[Copy]]) -> list[Any]:
    if isinstance(item, str) and item.startswith(_STAGE):
        stage = item.removeprefix(_STAGE)
        if stage not in found:  # the graph will say so
            return [item]
        return [_STAGE + one.name for one in found[stage]]  # none, where it is copied for no value
    if isinstance(item, str) and item.startswith(_LABELS):
        stage = item.removeprefix(_LABELS)
        return [one.label or stage for one in found.get(stage, [])]
    return [item]


def _name(stage: str, values: Mapping[str, str]) -> str:
    return "-".join((stage, *values.values()))
