"""The entry points' configs: every file composes and validates, every mistake is one sentence."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs.entry import (
    CONF,
    _by_hydra_alone,
    _opened,
    build_spec,
    choices,
    compose,
    override_value,
    plain,
    spec_values,
    trial_overrides,
)
from jobs.job_file import expand_arguments, job_from_config
from pipeline.errors import UserError
from pipeline.specs import EvaluateSpec, PreprocessSpec, TrainSpec, TuneSpec
from tests.pipeline.chain_data import finished_run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_experiment_composes_and_validates(experiment):
    config = compose("train", ["dataset=x", f"experiment={experiment}"])
    TrainSpec.build(spec_values(config, TrainSpec))


@pytest.mark.parametrize("job", choices("job"))
def test_job_composes_and_validates(job):
    stages = job_from_config(compose("run", [f"job={job}"])).stages
    assert {"preprocess", "train", "evaluate"} <= {stage.kind for stage in stages}


@pytest.mark.parametrize("search", choices("search"))
def test_search_composes_and_every_key_is_one_of_the_train_config(search):
    config = compose("tune", ["dataset=x", f"search={search}", "train.max_steps=3"])
    build_spec(TuneSpec, config, "tune")


@pytest.mark.parametrize("model", choices("model"))
@pytest.mark.parametrize("zero", choices("deepspeed"))
def test_train_groups_compose_and_validate(model, zero):
    config = compose(
        "train", ["dataset=x", f"model={model}", f"deepspeed={zero}", "train.max_steps=3"]
    )
    TrainSpec.build(spec_values(config, TrainSpec))


@pytest.mark.parametrize("corpus", choices("corpus"))
@pytest.mark.parametrize("tokenizer", choices("tokenizer"))
def test_preprocess_groups_compose_and_validate(corpus, tokenizer):
    overrides = [f"corpus={corpus}", f"tokenizer={tokenizer}"]
    overrides += ["corpus.path=x"] if corpus == "hf" else ["corpus.train=x"]
    overrides += [] if tokenizer == "bpe" else ["tokenizer.path=x"]
    PreprocessSpec.build(spec_values(compose("preprocess", overrides), PreprocessSpec))


@pytest.mark.parametrize(
    ("given", "length"),
    [([], (None, 1)), (["train.max_steps=7"], (7, None)), (["train.max_epochs=3"], (None, 3))],
)
def test_search_of_trials_without_a_length_makes_them_one_epoch(given, length):
    spec = build_spec(TuneSpec, compose("tune", ["dataset=x", *given]), "tune")
    assert (spec.trial.train.max_steps, spec.trial.train.max_epochs) == length


def test_search_space_given_whole_replaces_the_default():
    space = "search.space={train.seed: {integer: [0, 3]}}"
    config = compose("tune", ["dataset=x", "train.max_steps=3", space])
    assert config["search"]["space"] == {"train.seed": {"integer": [0, 3]}}


def test_open_table_takes_new_keys_one_by_one():
    overrides = ["dataset=x", "train.max_steps=3"]
    overrides.append("deepspeed.extra.zero_optimization.overlap_comm=false")
    extra = compose("train", overrides)["deepspeed"]["extra"]
    assert extra == {"zero_optimization": {"overlap_comm": False}}


def test_conf_holds_no_default_that_the_specs_do_not():
    config = compose("evaluate", ["weights=x", "dataset=y"])
    assert EvaluateSpec.build(spec_values(config, EvaluateSpec)) == EvaluateSpec()


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("train", ["dataset=x", "train.max_step=3"], "did you mean 'train.max_steps'?"),
        ("train", ["dataset=x", "trian.max_steps=3"], "did you mean 'train.max_steps'?"),
        ("train", ["dataset=x", "model=tinny"], "did you mean 'tiny'?"),
        ("train", ["model=tiny"], "'dataset' has no value"),
        ("train", ["dataset=x", "model"], "not of the form key=value"),
        ("run", [], "'job' has no value, but it is needed; job is one of: baselines, demo"),
        ("evaluate", ["weights=x"], "'dataset' has no value"),
        ("preprocess", ["tokeniser=bpe"], "did you mean 'tokenizer'?"),
    ],
)
def test_compose_mistake_is_one_sentence(name, overrides, expected):
    with pytest.raises(UserError) as caught:
        compose(name, overrides)
    assert expected in caught.value.message
    assert "\n" not in caught.value.message


def test_job_stage_overrides_reach_the_stage_and_win():
    arguments = ["job=demo", "model.train.max_steps=7", "data.tokenizer.vocab_size=301"]
    job = job_from_config(compose("run", expand_arguments(arguments)))
    specs = {stage.name: stage.spec for stage in job.stages}
    assert specs["model"].train.max_steps == 7
    assert specs["data"].tokenizer.vocab_size == 301


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("modle.train.max_steps=7", "did you mean 'model'?"),
        ("model.train.max_step=7", "stage 'model': unknown key 'train.max_step'"),
        ("model.model=tinny", "did you mean 'tiny'?"),
        ("model.train.max_steps=-1", "stage 'model': train.max_steps=-1 is refused"),
    ],
)
def test_job_stage_override_mistake_names_the_stage(argument, expected):
    with pytest.raises(UserError) as caught:
        job_from_config(compose("run", expand_arguments(["job=demo", argument])))
    assert expected in caught.value.message


def test_override_values_survive_hydra(tmp_path):
    value = {"text": 'a "quoted", {odd} = text', "list": [1, 2.5, True, None]}
    path = tmp_path / "a b=c.yaml"
    path.write_text(yaml.safe_dump({"storage": value["text"], "model.latent_layers": [0, 1]}))
    config = compose("train", ["dataset=x", *trial_overrides(str(path))])
    assert config["storage"] == value["text"]
    assert config["model"]["latent_layers"] == [0, 1]
    assert override_value(value["list"]) == "[1,2.5,true,null]"


def test_train_from_trial_takes_the_searchs_settings_and_the_command_lines_win(
    tmp_path, monkeypatch
):
    best = {"train.learning_rate": 0.002, "train.max_steps": 4}
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(best))
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script changes it
    with_trial = runpy.run_path(str(ROOT / "jobs" / "train.py"))["with_trial"]
    given = ["dataset=x", f"from_trial={tmp_path}", "train.max_steps=8"]
    train = compose("train", with_trial(given))["train"]
    assert (train["learning_rate"], train["max_steps"]) == (0.002, 8)


def test_from_trial_without_a_file_says_what_was_expected(tmp_path):
    with pytest.raises(UserError, match=r"holds no best\.yaml"):
        trial_overrides(str(tmp_path))


@pytest.mark.parametrize(
    "job",
    sorted(
        file.stem
        for file in (ROOT / "jobs").glob("*.py")
        if "run_job(" in file.read_text() and file.stem != "entry"
    ),
)
def test_job_user_error_exits_with_2_and_shows_no_traceback(job, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / f"{job}.py", "nonsense.key=1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_job_help_is_hydras_own(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "train.py", "dataset=x", "--cfg", "job"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert yaml.safe_load(done.stdout)["model"]["size"] == "tiny"
    assert list(tmp_path.iterdir()) == []
    assert CONF.is_dir()


def test_a_flag_shows_the_settings_of_a_trial_too(tmp_path):
    trial = tmp_path / "best.yaml"
    trial.write_text("train.learning_rate: 0.002\nmodel.latent_size: 5\n")
    done = subprocess.run(
        [
            sys.executable, ROOT / "jobs" / "train.py", "--cfg", "job", "dataset=x",
            f"from_trial={trial}", "model.latent_size=6",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    shown = yaml.safe_load(done.stdout)
    assert (shown["train"]["learning_rate"], shown["model"]["latent_size"]) == (0.002, 6)


def test_a_flag_shows_a_job_of_ones_own_with_its_settings(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "name: mine\ncorpus: coco\nstages: {model: {run: train, dataset: x}}\n"
    )
    done = subprocess.run(
        [
            sys.executable, ROOT / "jobs" / "run.py", "--cfg", "job", "job=mine.yaml",
            "corpus=snli", "model.train.max_steps=3",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)["job"]
    assert (shown["corpus"], shown["overrides"]) == ("snli", ["model.train.max_steps=3"])


def test_a_flag_beside_a_wrong_trial_is_a_user_error(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "train.py", "--cfg", "job", "from_trial=nowhere"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_job_multirun_runs_every_point_of_a_grid(tmp_path):
    run = finished_run(tmp_path / "run")
    done = subprocess.run(
        [
            sys.executable, ROOT / "jobs" / "report.py", "-m", f"training={run}", "title=A,B",
            f"storage={tmp_path / 'runs'}",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("artifact: ") == 2
    titles = {
        json.loads(file.read_text())["spec"]["title"]
        for file in (tmp_path / "runs" / "report").glob("*/artifact.json")
    }
    assert titles == {"A", "B"}


@pytest.mark.parametrize(
    "overrides",
    [
        ["dataset=x", "model=small", "train.max_steps=3", 'storage="a b"', "train.beta.value=0.5"],
        ["dataset=x", "experiment=paper", "model.latent_layers=[0,1]", "deepspeed=zero3"],
        ["dataset=x", "train.max_steps=3", "deepspeed.extra={a: {b: 1}}", "deepspeed.extra.c=2"],
        ["train.max_steps=3", "dataset=x", "train.max_steps=4", "model.backbone=null"],
    ],
)
def test_compose_is_what_hydra_alone_composes(overrides):
    expected = plain(_by_hydra_alone("train", list(_opened(overrides))))
    assert compose("train", overrides) == expected
    assert compose("train", overrides) == expected  # the second time from what was kept
