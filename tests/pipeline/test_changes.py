"""Why a stage would run: the very key or file that changed, with both values."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.artifact import Artifact, now
from pipeline.chain.changes import Records, differences
from pipeline.chain.estimate import estimate
from pipeline.chain.job_spec import JobSpec, JobStage, StageReference, TrialSettings, Undetermined
from pipeline.runner import Label
from pipeline.specs import ClusterSpec, EvaluateSpec, PreprocessSpec, TrainSpec, TuneSpec
from pipeline.storage import Location
from tests.pipeline.chain_data import after, job_of, page


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("one line\nanother line\n")
    return file


@pytest.fixture
def storage(tmp_path):
    return Location.parse(tmp_path / "runs")


def small_job(corpus, vocab_size=300, steps=3):
    tokenizer = {"kind": "bpe", "vocab_size": vocab_size}
    preprocess = PreprocessSpec.build(
        {"corpus": {"kind": "text", "train": str(corpus)}, "tokenizer": tokenizer}
    )
    train = TrainSpec.build({"model": {"size": "tiny"}, "train": {"max_steps": steps}})
    data = StageReference("data")
    return job_of(
        JobStage("data", "preprocess", preprocess, {}),
        JobStage("model", "train", train, {"dataset": data}),
        JobStage("figures", "evaluate", EvaluateSpec(), {"weights": after("model"),
                                                         "dataset": data}),
        page("page", after("model")),
    )  # fmt: skip


def finish(job, storage):
    """Write the records that a run of all stages would have left."""
    for stage, found in job.plan(storage):
        Artifact(
            folder=found.output, stage=stage.kind, fingerprint=found.fingerprint,
            spec=found.spec.model_dump(mode="json"), inputs=found.input_fingerprints,
            input_files=found.input_files, status="done", started_at=now(), took_s=8.0,
            figures={"steps": 4, "num_parameters": 1000, "num_documents": 10},
            job=job.name, name=stage.name,
        ).save()  # fmt: skip


def reasons(job, storage):
    """For each stage that is not done: what differs from what it had before."""
    records = Records(storage)
    found = {}
    for stage, planned in job.plan(storage):
        if not planned.is_done:
            earlier = records.earlier(planned, Label(job.name, stage.name))
            found[stage.name] = list(differences(planned, earlier))
    return found


def test_changes_of_a_key_are_told_with_both_values(corpus, storage):
    finish(small_job(corpus), storage)
    found = reasons(small_job(corpus, steps=4), storage)
    assert found["model"] == ["train.max_steps: 3 → 4"]
    assert set(found) == {"model", "figures", "page"}
    assert found["figures"][0].startswith("weights: ")


def test_changes_of_a_file_are_told_with_both_checksums(corpus, storage):
    finish(small_job(corpus), storage)
    corpus.write_text("one line\nyet another line\n")
    found = reasons(small_job(corpus), storage)
    assert len(found) == 4
    (told,) = found["data"]
    assert told.startswith("corpus.train corpus.txt: ")
    before, now_ = told.rsplit(": ", 1)[1].split(" → ")
    assert before != now_
    assert len(before) == len(now_) == 12


def test_changes_of_the_tokenizer_reach_all_that_depends_on_it(corpus, storage):
    finish(small_job(corpus), storage)
    found = reasons(small_job(corpus, vocab_size=301), storage)
    assert found["data"] == ["tokenizer.vocab_size: 300 → 301"]
    assert set(found) == {"data", "model", "figures", "page"}


def test_changes_of_nothing_leave_all_done(corpus, storage):
    finish(small_job(corpus), storage)
    assert reasons(small_job(corpus), storage) == {}


def test_changed_code_runs_again_only_when_it_is_part_of_the_identity(corpus, storage, monkeypatch):
    job = replace(small_job(corpus), with_code=True)
    finish(job, storage)
    monkeypatch.setattr("pipeline.runner.code_version", lambda: "0" * 12)
    assert set(reasons(job, storage)) == {"data", "model", "figures", "page"}
    plain = small_job(corpus)
    finish(plain, storage)
    assert reasons(plain, storage) == {}


def test_estimate_scales_earlier_runs_of_the_same_shape(corpus, storage):
    finish(small_job(corpus), storage)
    job = small_job(corpus, steps=40)
    planned = {stage.name: found for stage, found in job.plan(storage)}["model"]
    told = estimate(planned, Records(storage))
    assert told.steps == 40
    assert told.tokens == 40 * 8192
    assert told.time_s == pytest.approx(8.0 * 40 / 4)  # 8 s for the 4 steps on record
    assert told.memory_bytes == 16_000
    assert "40 steps" in str(told)


def test_job_with_a_search_names_the_rest_when_it_is_done(corpus, storage):
    trial = TrainSpec.build({"model": {"size": "tiny"}, "train": {"max_steps": 3}})
    space = {"train.learning_rate": {"uniform": [0.1, 0.2]}}
    tune = TuneSpec.build({"search": {"space": space}, "trial": trial})
    seen = []

    def spec_with(folder):
        seen.append(folder)
        return trial

    data = JobStage("data", "preprocess", small_job(corpus).stages[0].spec, {})
    search = JobStage("search", "tune", tune, {"dataset": after("data")})
    best = JobStage(
        "best", "train", trial, {"dataset": after("data")},
        TrialSettings(after("search"), spec_with),
    )  # fmt: skip
    last = page("page", after("best"))
    job = JobSpec.build("s", {s.name: s for s in (data, search, best, last)}, ClusterSpec())
    found = {stage.name: planned for stage, planned in job.plan(storage)}
    assert found["best"] == found["page"] == Undetermined("search")
    assert not seen
    finish(JobSpec.build("s", {s.name: s for s in (data, search)}, ClusterSpec()), storage)
    found = {stage.name: planned for stage, planned in job.plan(storage)}
    assert seen == [found["search"].output]
    assert found["page"].inputs["training"] == found["best"].output
