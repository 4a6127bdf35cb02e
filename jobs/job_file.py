"""From a job's file, `conf/job/<name>.yaml`, to the typed `JobSpec`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from jobs.entry import CONF, Config, choices, compose, override_value, spec_values
from pipeline.errors import UserError, nearest
from pipeline.job_spec import JobSpec, JobStage, StageReference
from pipeline.runner import KINDS, StageKind, kind_of
from pipeline.specs import ClusterSpec
from pipeline.storage import Location

_TOP_LEVEL = ("job", "action", "storage", "folder", "cluster")


def split_stage_overrides(arguments: list[str]) -> list[str]:
    """Gather `STAGE.key=value` into one list, `job.overrides`, that `job_from_config` deals out.

    Raises:
        UserError: if a key starts with neither a key of `conf/run.yaml` nor a stage's name.
    """
    job = next((a.split("=", 1)[1] for a in arguments if a.startswith("job=")), None)
    if job is None or job not in choices("job"):
        return arguments  # composing them says what is wrong
    stages = list(yaml.safe_load((CONF / "job" / f"{job}.yaml").read_text())["stages"])
    for_hydra, for_stages = [], []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        head, _, rest = key.lstrip("+").partition(".")
        if not equals or head in _TOP_LEVEL:
            for_hydra.append(argument)
        elif head in stages and rest:
            for_stages.append(f"{head}.{rest}={value}")
        else:
            known = [*_TOP_LEVEL, *(f"{stage}.KEY" for stage in stages)]
            raise UserError(
                f"unknown key '{key}'{nearest(head, [*_TOP_LEVEL, *stages])}; the keys of job "
                f"{job} are: {', '.join(known)}."
            )
    if for_stages:
        for_hydra.append(f"+job.overrides={override_value(for_stages)}")
    return for_hydra


def job_from_config(config: Config) -> JobSpec:
    """Build the typed job from a composed `conf/run.yaml`.

    Raises:
        UserError: naming the stage and the key that is wrong.
    """
    job = config["job"]
    overrides = job.get("overrides") or []
    stages = {}
    for name, entry in job["stages"].items():
        own = [o.removeprefix(f"{name}.") for o in overrides if o.startswith(f"{name}.")]
        stages[name] = _stage(name, entry, own, config["cluster"])
    cluster = ClusterSpec.build(config["cluster"], "cluster")
    return JobSpec.build(job["name"], stages, cluster)


def _stage(
    name: str, entry: Mapping[str, Any], overrides: list[str], cluster: Mapping[str, Any]
) -> JobStage:
    if not isinstance(entry.get("run"), str):
        raise UserError(f"stage '{name}': it needs 'run:', one of {', '.join(KINDS)}.")
    kind = kind_of(entry["run"])
    known = kind.all_inputs
    inputs = {key: _source(entry[key]) for key in known if entry.get(key) is not None}
    settings = {key: value for key, value in entry.items() if key != "run" and key not in known}
    try:
        config = _stage_config(kind, settings, overrides)
        config["cluster"] = dict(cluster)
        spec = kind.spec.build(spec_values(config, kind.spec), f"stage '{name}'")
    except UserError as error:
        prefix = f"stage '{name}': "
        message = error.message.removeprefix(f"stage '{name}': ")
        raise UserError(prefix + message) from None
    return JobStage(name, kind.name, spec, inputs)


def _stage_config(kind: StageKind, settings: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """Compose the stage's own config with its entry in the file, then the command line's keys."""
    given = {override.split("=", 1)[0].lstrip("+~") for override in overrides}
    from_file = [o for o in _overrides(settings) if o.split("=", 1)[0] not in given]
    references = [f"{key}=null" for key in kind.all_inputs]
    return compose(kind.name, [*references, *from_file, *overrides])


def _source(value: str) -> StageReference | Location:
    if value.startswith("stage:"):
        return StageReference(value.removeprefix("stage:"))
    return Location.parse(value)


def _overrides(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Write nested settings as hydra's overrides, `key.inner=value`."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _overrides(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={override_value(value)}"
