"""What all entry points share: compose a config, report errors, print the artifact.

Exit codes: 0 done; 2 the user can put it right (one sentence, no traceback); 1 a failure of ours
(with its traceback); 130 interrupted.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from pipeline.artifact import Artifact
from pipeline.cluster import refuse_storage_that_vanishes
from pipeline.errors import UserError, nearest, user_error_within
from pipeline.runner import Input, plan, run_stage
from pipeline.secrets import redacted
from pipeline.specs import (
    ClusterSpec,
    CorpusSpec,
    DeepSpeedSpec,
    EvaluationSpec,
    ModelSpec,
    OptimizationSpec,
    SearchSpec,
    Spec,
    TokenizerSpec,
    TrainSpec,
    TuneSpec,
)
from pipeline.specs.doctor import DoctorSpec
from pipeline.specs.export import ExportSpec
from pipeline.specs.generate import GenerateSpec
from pipeline.specs.render import RenderSpec
from pipeline.specs.tune import TRIAL_EPOCHS
from pipeline.storage import Location
from pipeline.tuning.space import check_search

CONF = Path(__file__).resolve().parents[1] / "conf"
Config = dict[str, Any]
SpecType = TypeVar("SpecType", bound=Spec)


GROUPS: dict[str, type[Spec]] = {
    "corpus": CorpusSpec,
    "tokenizer": TokenizerSpec,
    "model": ModelSpec,
    "train": OptimizationSpec,
    "deepspeed": DeepSpeedSpec,
    "search": SearchSpec,
    "evaluate": EvaluationSpec,
    "generate": GenerateSpec,
    "export": ExportSpec,
    "doctor": DoctorSpec,
    "cluster": ClusterSpec,
    "render": RenderSpec,
}
# Tables whose keys are the user's own, such as `search.space`: hydra would refuse new ones.
OPEN_TABLES = tuple(
    f"{group}.{name}"
    for group, spec in GROUPS.items()
    for name, field in spec.model_fields.items()
    if get_origin(field.annotation) is dict
)


def stage_reference(name: str) -> str:
    """What `${stage:NAME}` in a job's file becomes: text that `jobs/run.py` recognises."""
    return f"stage:{name}"


def labels_of(name: str) -> str:
    """What `${labels:NAME}` in a job's file becomes: text that `jobs/job_copies.py` recognises."""
    return f"labels:{name}"


def register_specs() -> None:
    """Give hydra every key of the specs with its default, as `<group>/spec`.

    The files in conf/ start from these and hold only what differs: a default stands once, in the
    spec.
    """
    for group, spec in GROUPS.items():
        ConfigStore.instance().store(group=group, name="spec", node=defaults_of(spec))


def defaults_of(spec: type[Spec]) -> Config:
    """The defaults of a spec as plain values; "???" where the user must give one."""
    defaults: Config = {}
    for name, field in spec.model_fields.items():
        if field.is_required():
            defaults[name] = "???"
            continue
        value = field.get_default(call_default_factory=True)
        defaults[name] = value.model_dump(mode="json") if isinstance(value, Spec) else value
    return defaults


OmegaConf.register_new_resolver("stage", stage_reference, replace=True)
OmegaConf.register_new_resolver("labels", labels_of, replace=True)
register_specs()


def run_job(
    config_name: str,
    body: Callable[[Config], None],
    expand: Callable[[list[str]], list[str]] = list,
) -> None:
    """Compose `conf/<config_name>.yaml` with the command line, call `body`, and exit.

    Flags (`--help`, `--cfg job`, `-m`) are hydra's own and go to it, with the same overrides.

    Args:
        config_name: the primary config.
        body: what to do with the composed config.
        expand: turns the command line's overrides into those that are composed.
    """
    arguments = sys.argv[1:]
    if any(argument.startswith("-") for argument in arguments):
        guarded(lambda: _run_by_hydra(config_name, body, expand, arguments))
        return
    guarded(lambda: body(compose(config_name, expand(arguments))))


def _run_by_hydra(
    config_name: str,
    body: Callable[[Config], None],
    expand: Callable[[list[str]], list[str]],
    arguments: list[str],
) -> None:
    flags = [argument for argument in arguments if not _is_override(argument)]
    overrides = [argument for argument in arguments if _is_override(argument)]
    sys.argv[1:] = [*flags, *_opened(expand(overrides))]

    @hydra.main(version_base=None, config_path=str(CONF), config_name=config_name)
    def through_hydra(config: DictConfig) -> None:
        sys.argv[1:] = arguments  # for a body that reads what the user gave
        guarded(lambda: body(plain(config)))

    through_hydra()


def _is_override(argument: str) -> bool:
    """Whether an argument is an override, and neither a flag nor the value of one (`--cfg job`)."""
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def guarded(body: Callable[[], None]) -> None:
    """Call `body`; leave the process with the exit code of its error, if it raises one."""
    try:
        body()
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what is done.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        user_error = user_error_within(error)
        if user_error is None:
            print(redacted(traceback.format_exc()), file=sys.stderr)
            sys.exit(1)
        print(f"error: {redacted(user_error.message)}", file=sys.stderr)
        sys.exit(2)


def compose(config_name: str, overrides: Sequence[str]) -> Config:
    """Compose a config as plain values.

    Raises:
        UserError: for an unknown key or group choice, with the nearest right name.
    """
    try:
        return plain(_composed(config_name, overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_sentence(config_name, overrides, error)) from None


def _composed(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose with hydra: its choice of files once a process, on a copy of that the plain values.

    A job composes a config a stage, and most stages choose the same files.
    """
    opened = list(_opened(overrides))
    values = [override for override in opened if _is_plain_value(override)]
    chosen = tuple(override for override in opened if override not in values)
    try:
        config = copy.deepcopy(_chosen(config_name, chosen))
        for override in OverridesParser.create().parse_overrides(values):
            if override.is_sweep_override():
                raise HydraException(f"{override.input_line} is a sweep")
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
    except (HydraException, OmegaConfBaseException):
        return _by_hydra_alone(config_name, opened)  # which says what is wrong
    return config


@functools.cache
def _chosen(config_name: str, overrides: tuple[str, ...]) -> DictConfig:
    return _by_hydra_alone(config_name, overrides)


def _by_hydra_alone(config_name: str, overrides: Sequence[str]) -> DictConfig:
    with hydra.initialize_config_dir(version_base=None, config_dir=str(CONF)):
        return hydra.compose(config_name, overrides=list(overrides))


def _is_plain_value(override: str) -> bool:
    """Whether an override sets a key, and neither picks a file nor adds or deletes."""
    key, equals, _ = override.partition("=")
    return bool(equals) and key[:1].isalpha() and "@" not in key and not (CONF / key).is_dir()


def _opened(overrides: Sequence[str]) -> Iterator[str]:
    """Let an open table be given whole, in place of its default, or key by key."""
    for override in overrides:
        key = override.split("=", 1)[0]
        if key in OPEN_TABLES:
            yield f"~{key}"
            yield f"+{override}"
        elif key.startswith(tuple(f"{table}." for table in OPEN_TABLES)):
            yield f"++{override}"
        else:
            yield override


def plain(config: DictConfig) -> Config:
    """Resolve a config into dictionaries, lists and scalars.

    Raises:
        UserError: if a key that is needed has no value.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"'{missing[0]}' has no value, but it is needed; set {missing[0]}=...")
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def choices(group: str) -> list[str]:
    """Names of the files of a config group, `conf/<group>/*.yaml`."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def _sentence(config_name: str, overrides: Sequence[str], error: Exception) -> str:
    """Say in one sentence what hydra says in several lines."""
    for override in overrides:
        if "=" not in override:
            return f"'{override}' is not of the form key=value."
        key, value = override.lstrip("+~").split("=", 1)
        value = value.strip("\"'")
        if (CONF / key).is_dir() and value not in choices(key) and not value.startswith("["):
            known = choices(key)
            return f"{key}={value} is not there{nearest(value, known)}; {key} is one of: " + (
                f"{', '.join(known)}."
            )
    if "You must specify" in str(error):
        group = str(error).split("'")[1]
        return f"'{group}' has no value, but it is needed; {group} is one of: " + (
            f"{', '.join(choices(group))}."
        )
    absent = re.search(r"Interpolation key '([^']+)' not found", str(error))
    if absent:
        return f"'{absent[1]}' is referred to, but is not there: one of its parts is misspelt."
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    if unknown:
        return _unknown_key(config_name, overrides, unknown[1])
    return f"the command line cannot be read: {' '.join(str(error).split())}"


def _unknown_key(config_name: str, overrides: Sequence[str], key: str) -> str:
    groups = [o for o in overrides if (CONF / o.split("=", 1)[0]).is_dir()]
    known = flat_keys(_composed(config_name, groups))
    siblings = [k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]]
    near = nearest(key, siblings) or nearest(key, known)
    listed = siblings or sorted({k.split(".")[0] for k in known})
    return f"unknown key '{key}'{near}; the keys there are: {', '.join(listed)}."


def flat_keys(config: DictConfig) -> list[str]:
    """All dotted keys of a config, those of its sections among them."""
    keys: list[str] = []
    for name in config:
        keys.append(str(name))
        value = config._get_node(name)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing():
            keys += [f"{name!s}.{inner}" for inner in flat_keys(value)]
    return keys


def spec_values(config: Config, spec: type[Spec]) -> Config:
    """The part of a config that its spec holds; the rest says where things are."""
    return {key: value for key, value in config.items() if key in spec.model_fields}


def build_spec(spec: type[SpecType], config: Config, where: str) -> SpecType:
    """Build a stage's spec from its composed config; a search holds that of its trials.

    Raises:
        UserError: naming the first key that is wrong.
    """
    values = spec_values(config, spec)
    if spec is TuneSpec:
        trial = spec_values(config, TrainSpec)
        if trial["train"]["max_steps"] is None and trial["train"]["max_epochs"] is None:
            trial["train"] = {**trial["train"], "max_epochs": TRIAL_EPOCHS}
        values["trial"] = TrainSpec.build(trial, where)
    built = spec.build(values, where)
    if isinstance(built, TuneSpec):
        check_search(built)
    return built


def ensure(
    name: str, spec: Spec, inputs: Mapping[str, str | list[str] | None], storage: str
) -> Artifact:
    """Run one stage, or find it done; say which, and print where its artifact is."""
    given: dict[str, Input | list[Input]] = {}
    for key, value in inputs.items():
        if isinstance(value, str):
            given[key] = Input.of_folder(key, Location.parse(value))
        elif value is not None:
            given[key] = [Input.of_folder(key, Location.parse(folder)) for folder in value]
    root = Location.parse(storage)
    refuse_storage_that_vanishes(root)
    planned = plan(name, spec, given, root)
    if planned.is_done:
        Console().print(f"{name}: already done", highlight=False)
    artifact = run_stage(planned)
    print(redacted(f"artifact: {artifact.folder}"), flush=True)
    return artifact


def trial_overrides(path: str) -> list[str]:
    """Read the settings of a search's best trial: a tune artifact's folder, or its `best.yaml`.

    Raises:
        UserError: if there is no such file, or it does not hold `key: value` lines.
    """
    location = Location.parse(path)
    file = location if location.is_file() else location / "best.yaml"
    if not file.is_file():
        raise UserError(
            f"from_trial={path} holds no best.yaml: expected the folder that jobs/tune.py printed, "
            "or the best.yaml in it."
        )
    settings = yaml.safe_load(file.read_bytes())
    if not isinstance(settings, dict):
        raise UserError(f"{file} should hold 'key: value' lines of the train config, but does not.")
    return [f"{key}={override_value(value)}" for key, value in settings.items()]


def override_value(value: Any) -> str:
    """Write a plain value in the grammar of hydra's overrides."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{','.join(override_value(item) for item in value)}]"
    if isinstance(value, Mapping):
        inner = ",".join(f"{key}:{override_value(item)}" for key, item in value.items())
        return "{" + inner + "}"
    return json.dumps(value)
