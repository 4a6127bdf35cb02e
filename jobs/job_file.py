"""From a job's file, `conf/job/<name>.yaml` or any other, to the typed `JobSpec`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from jobs.entry import (
    CONF,
    OPEN_TABLES,
    Config,
    build_spec,
    choices,
    compose,
    override_value,
    plain,
    trial_overrides,
)
from jobs.job_copies import Copy, copies
from pipeline.chain.job_spec import JobSpec, JobStage, Source, StageReference, TrialSettings
from pipeline.errors import UserError, nearest
from pipeline.runner import KINDS, StageKind, kind_of
from pipeline.specs import ClusterSpec, Spec
from pipeline.specs.job import StageOptions
from pipeline.storage import Location

_TOP_LEVEL = (
    "job", "action", "from", "only", "force", "storage", "folder", "cluster", "code_in_identity",
    "render",
)  # fmt: skip
_NO_SETTINGS = ("name", "stages", "overrides")  # all else at the top of a job's file can be set
_LISTS = ("only", "force")
_TRIAL = "from_trial"


def expand_arguments(arguments: list[str]) -> list[str]:
    """Turn the command line into overrides that hydra composes.

    `STAGE.key=value` are gathered into one list, `job.overrides`, that `job_from_config` deals out;
    `only=a,b` becomes a list; `job=FILE.yaml` is read from where it lies. What else stands at the
    top of a job's file is the job's own setting, as `corpus=coco` of job=study.

    Raises:
        UserError: if a key starts with neither a key of `conf/run.yaml` nor a stage's name.
    """
    job = next((a.split("=", 1)[1] for a in arguments if a.startswith("job=")), None)
    file = _file_of(job) if job is not None else None
    if job is None or file is None:
        return arguments  # composing them says what is wrong
    stages, settings = list(_stages_in(file)), _settings_in(file)
    for_hydra, for_stages = [], []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        head, _, rest = key.lstrip("+").partition(".")
        if key == "job":
            for_hydra.append(f"job={_registered(file)}")
        elif key in _LISTS:
            names = [name for name in value.strip("[]").split(",") if name]
            for_hydra.append(f"{key}={override_value(names)}")
        elif not equals or head in _TOP_LEVEL:
            for_hydra.append(argument)
        elif head in stages and rest:
            for_stages.append(f"{head}.{rest}={value}")
        elif head in settings:
            for_hydra.append(f"job.{key}={value}")
        else:
            known = [*_TOP_LEVEL, *settings, *(f"{stage}.KEY" for stage in stages)]
            near = nearest(head, [*_TOP_LEVEL, *settings, *stages])
            raise UserError(
                f"unknown key '{key}'{near}; the keys of job {file.stem} are: {', '.join(known)}."
            )
    if for_stages:
        for_hydra.append(f"+job.overrides={override_value(for_stages)}")
    return for_hydra


def _file_of(job: str) -> Path | None:
    """The file that `job=` means; None when there is none."""
    if job in choices("job"):
        return CONF / "job" / f"{job}.yaml"
    path = Path(job).expanduser()
    return path if path.suffix in (".yaml", ".yml") and path.is_file() else None


def _registered(file: Path) -> str:
    """The name by which hydra finds a job's file, wherever it lies."""
    if file.parent == CONF / "job":
        return file.stem
    content = hashlib.sha256(file.read_bytes()).hexdigest()[:8]  # a changed file is another one
    name = f"file-{file.stem}-{content}"
    ConfigStore.instance().store(group="job", name=name, node=OmegaConf.load(file))
    return name


def _stages_in(file: Path) -> dict[str, int]:
    """The stages of a job's file, and the line that each stands on.

    Raises:
        UserError: if the file is not YAML with a table of `stages`.
    """
    try:
        tree = yaml.compose(file.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}.") from None
    top = {key.value: value for key, value in tree.value} if tree is not None else {}
    stages = top.get("stages")
    if not isinstance(stages, yaml.MappingNode):
        raise UserError(f"{file}: it has no table 'stages:', where a job names its stages.")
    return {key.value: key.start_mark.line + 1 for key, _ in stages.value}


def _settings_in(file: Path) -> list[str]:
    """The keys at the top of a job's file that are its own settings."""
    return [str(key) for key in OmegaConf.load(file) if key not in _NO_SETTINGS]


def job_from_config(config: Config, file: Path | None = None) -> JobSpec:
    """Build the typed job from a composed `conf/run.yaml`.

    Args:
        config: what hydra composed.
        file: the job's file, for the places that errors name; None: `conf/job/<name>.yaml`.

    Raises:
        UserError: naming the stage, its place and the key that is wrong.
    """
    job = config["job"]
    file = file or _file_of(job["name"])
    lines = _stages_in(file) if file is not None else {}
    overrides = job.get("overrides") or []
    cluster = ClusterSpec.build(config["cluster"], "cluster")
    stages = {}
    for copy in copies(job["stages"]):
        head, line = f"{copy.stage}.", lines.get(copy.stage)
        own = [o.removeprefix(head) for o in overrides if o.startswith(head)]
        place = f"{_shown(file)}:{line}" if file is not None and line else ""
        stages[copy.name] = _stage(copy, own, config["cluster"], place)
    return JobSpec.build(job["name"], stages, cluster, bool(config["code_in_identity"]))


def file_of_arguments(arguments: Sequence[str]) -> Path | None:
    """The job's file that a command line names."""
    job = next((a.split("=", 1)[1] for a in arguments if a.startswith("job=")), None)
    return _file_of(job) if job is not None else None


def _shown(file: Path) -> str:
    root = CONF.parent
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)


def _stage(
    copy: Copy,
    overrides: list[str],
    cluster: Mapping[str, Any],
    place: str,
) -> JobStage:
    name, entry = copy.name, copy.entry
    with JobStage(name, "", Spec(), {}, place=place).blamed():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("run"), str):
            raise UserError(f"it needs 'run:', one of {', '.join(KINDS)}.")
        kind = kind_of(entry["run"])
        known = kind.all_inputs
        inputs = {key: _sources(key, entry[key], kind) for key in known if entry.get(key)}
        for needed in kind.inputs:
            if needed not in inputs:
                raise UserError(
                    f"'{needed}' has no value, but a stage of {kind.name} needs it; set it to "
                    "${stage:NAME} or to a folder."
                )
        options = {key: entry[key] for key in StageOptions.model_fields if key in entry}
        given = [o for o in overrides if o.split("=")[0].split(".")[0] in StageOptions.model_fields]
        spec_overrides = [o for o in overrides if o not in given]
        options = plain(DictConfig(OmegaConf.merge(options, OmegaConf.from_dotlist(given))))
        settings = {
            key: value
            for key, value in entry.items()
            if key not in ("run", _TRIAL, *known, *options)
        }
        trial = _source(entry[_TRIAL]) if entry.get(_TRIAL) else None
        if trial is not None and kind.name != "train":
            raise UserError(f"{_TRIAL} gives a training its settings; {kind.name} takes none.")

        def spec_with(search: Location | None) -> Spec:
            first = trial_overrides(str(search)) if search is not None else []
            shared = {key: value for key, value in settings.items() if key in copy.shared}
            own = {key: value for key, value in settings.items() if key not in copy.shared}
            given = [*_overrides(shared), *first, *_overrides(own)]
            composed = _stage_config(kind, given, spec_overrides)
            composed["cluster"] = dict(cluster)
            return build_spec(kind.spec, composed, f"stage '{name}'")

        return JobStage(
            name,
            kind.name,
            spec_with(trial if isinstance(trial, Location) else None),
            inputs,
            TrialSettings(trial, spec_with) if isinstance(trial, StageReference) else None,
            StageOptions.build(options, f"stage '{name}'"),
            place,
            copy_of=copy.stage if copy.values else "",
        )


def _stage_config(kind: StageKind, from_file: Sequence[str], overrides: Sequence[str]) -> Config:
    """Compose the stage's own config: its entry in the file, then the command line's keys."""
    given = {override.split("=", 1)[0].lstrip("+~") for override in overrides}
    kept = [o for o in from_file if o.split("=", 1)[0] not in given]
    references = [f"{key}=null" for key in kind.all_inputs]
    return compose(kind.name, [*references, *kept, *overrides])


def _sources(key: str, value: Any, kind: StageKind) -> Source | list[Source]:
    if key not in kind.list_inputs:
        if not isinstance(value, str):
            raise UserError(f"{key} is one ${{stage:NAME}} or folder, got {value!r}.")
        return _source(value)
    return [_source(each) for each in ([value] if isinstance(value, str) else value)]


def _source(value: str) -> Source:
    if value.startswith("stage:"):
        return StageReference(value.removeprefix("stage:"))
    return Location.parse(value)


def _overrides(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Write nested settings as hydra's overrides, `key.inner=value`."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and prefix + str(key) not in OPEN_TABLES:
            yield from _overrides(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={override_value(value)}"
