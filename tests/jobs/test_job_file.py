"""A job's file: every mistake is a sentence with its place; plans import no Ray and no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.entry import compose
from jobs.job_file import expand_arguments, file_of_arguments, job_from_config
from pipeline.artifact import Artifact, now
from pipeline.chain.job_spec import StageReference
from pipeline.errors import UserError
from pipeline.storage import Location

ROOT = Path(__file__).parents[2]
DATA = """name: mine
stages:
  data:
    run: preprocess
    corpus: text
    corpus.train: CORPUS
    tokenizer: bpe
    tokenizer.vocab_size: 300
"""
MODEL = """  model:
    run: train
    dataset: ${stage:data}
    train.max_steps: 3
"""
PAGE = "  page: {run: report, runs: ['${stage:model}', '${stage:other}']}\n"


@pytest.fixture
def write(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("one line\nanother line\n")

    def write_file(text):
        file = tmp_path / "mine.yaml"
        file.write_text(text.replace("CORPUS", str(corpus)))
        return file

    return write_file


def job(file, *arguments):
    given = [f"job={file}", *arguments]
    return job_from_config(compose("run", expand_arguments(given)), file_of_arguments(given))


def test_job_file_anywhere_is_read_with_lists_and_options(write):
    other = MODEL.replace("model:", "other:") + "    train.seed: 1\n    retries: 2\n"
    file = write(DATA + MODEL + other + PAGE)
    built = job(file, "model.train.max_steps=9", "model.timeout_s=60", "model.resources.cpus=1")
    stages = {stage.name: stage for stage in built.stages}
    assert stages["page"].inputs["runs"] == [StageReference("model"), StageReference("other")]
    assert stages["page"].needs == {"model", "other"}
    assert stages["other"].options.retries == 2
    assert stages["model"].options.timeout_s == 60
    assert stages["model"].options.resources.cpus == 1
    assert stages["model"].spec.train.max_steps == 9


@pytest.mark.parametrize(
    ("text", "place", "expected"),
    [
        (DATA + MODEL.replace("stage:data", "stage:dat"), 9, "did you mean 'data'"),
        (DATA + MODEL.replace("run: train", "run: trian"), 9, "did you mean 'train'"),
        (DATA + MODEL.replace("    dataset: ${stage:data}\n", ""), 9, "'dataset' has no value"),
        (DATA + MODEL.replace("max_steps: 3", "max_step: 3"), 9, "did you mean 'train.max_steps'"),
        (DATA + MODEL.replace("max_steps: 3", "max_steps: 0"), 9, "train.max_steps=0 is refused"),
        (DATA + MODEL + "    retries: -1\n", 9, "retries=-1 is refused"),
        (DATA + MODEL + "    from_trial: ${stage:model}\n", 9, "wait for each other in a cycle"),
        (DATA + "  model: {}\n", 9, "it needs 'run:'"),
        (
            DATA + MODEL.replace("run: train", "run: tune")
            + "    search.space: {train.learning_rat: {uniform: [0.1, 0.2]}}\n",
            9, "did you mean 'learning_rate'",
        ),
        (
            DATA + MODEL.replace("run: train", "run: tune")
            + "    search.space: {train.warmup_steps: {uniform: [1, 9]}}\n",
            9, "train.warmup_steps=",
        ),
        (
            DATA + MODEL.replace("run: train", "run: tune") + "    search.metric: valid_elbo\n",
            9, "is never reported while a trial trains (did you mean 'valid_loss'?)",
        ),
        (
            DATA + MODEL.replace("run: train", "run: tune")
            + "    search.objectives: {evaluated_mi: max}\n",
            9, "search.objectives: evaluated_mi is never reported",
        ),
        (
            DATA + MODEL.replace("run: train", "run: tune")
            + "    search: grid\n    num_trials: 3\n",
            9, "the grid has 4 points, but num_trials=3",
        ),
    ],
)  # fmt: skip
def test_job_file_mistake_is_one_sentence_with_its_place(write, text, place, expected):
    with pytest.raises(UserError) as caught:
        job(write(text))
    assert expected in caught.value.message
    assert f"mine.yaml:{place}: stage 'model': " in caught.value.message
    assert "\n" not in caught.value.message


def test_job_file_with_two_stages_of_one_work_names_both(write, tmp_path):
    file = write(DATA + MODEL + MODEL.replace("model:", "again:"))
    with pytest.raises(UserError, match=r"mine.yaml:13: stage 'again': it is the same work as st"):
        list(job(file).plan(Location.parse(tmp_path / "runs")))


def test_job_file_that_is_no_job_says_so(write):
    with pytest.raises(UserError, match="no table 'stages:'"):
        job(write("name: mine\n"))
    with pytest.raises(UserError, match="is not YAML"):
        job(write("stages: [\n"))


def run(*arguments, cwd, prelude=""):
    """`jobs/run.py` in a process that tells at its end whether it imported Ray or torch."""
    code = (
        f"import sys, atexit, runpy; {prelude}"
        "atexit.register(lambda: print('heavy', sorted({'ray', 'torch'} & set(sys.modules)))); "
        f"sys.argv = {['run.py', *map(str, arguments)]!r}; sys.path.insert(0, ''); "
        f"runpy.run_path({str(ROOT / 'jobs' / 'run.py')!r}, run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_plan_and_status_of_twenty_stages_import_neither_ray_nor_torch(write, tmp_path):
    models = "".join(
        MODEL.replace("model:", f"model{seed}:") + f"    train.seed: {seed}\n" for seed in range(19)
    )
    file = write(DATA + models)
    storage = Location.parse(tmp_path / "runs")
    for stage, found in job(file).plan(storage):
        Artifact(
            found.output, stage.kind, found.fingerprint, found.spec.model_dump(mode="json"),
            found.input_fingerprints, "done", now(), took_s=1.0, figures={"kl": 1.5},
        ).save()  # fmt: skip
    for action, shown in (("plan", "its artifact is there"), ("status", "kl 1.50")):
        done = run(f"job={file}", f"storage={storage}", f"action={action}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(shown) == 20
        assert done.stdout.splitlines()[-1] == "heavy []"


def test_render_prints_the_manifest_of_this_command(write, tmp_path):
    file = write(DATA)
    done = run(
        f"job={file}", "storage=s3://b/runs", "action=render", "render.image=r/della:1",
        "render.workers=3", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "image: r/della:1" in done.stdout
    assert "replicas: 3" in done.stdout
    assert "action=render" not in done.stdout
