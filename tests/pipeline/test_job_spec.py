"""The graph of a job: order, references, identity along the chain."""

from __future__ import annotations

import pytest

from pipeline.artifact import Artifact, now
from pipeline.chain.job_spec import JobSpec, JobStage, StageReference
from pipeline.errors import UserError
from pipeline.runner import Input, plan, run_stage
from pipeline.specs import ClusterSpec, EvaluateSpec, PreprocessSpec, ReportSpec, TrainSpec
from pipeline.storage import Location


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("one line\nanother line\n")
    return file


def stages(corpus, steps=3):
    tokenizer = {"kind": "bpe", "vocab_size": 300}
    preprocess = PreprocessSpec.build(
        {"corpus": {"kind": "text", "train": str(corpus)}, "tokenizer": tokenizer}
    )
    train = TrainSpec.build({"model": {"size": "tiny"}, "train": {"max_steps": steps}})
    data, model = StageReference("data"), StageReference("model")
    return {
        "page": JobStage("page", "report", ReportSpec(), {"training": model}),
        "figures": JobStage(
            "figures", "evaluate", EvaluateSpec(), {"weights": model, "dataset": data}
        ),
        "model": JobStage("model", "train", train, {"dataset": data}),
        "data": JobStage("data", "preprocess", preprocess, {}),
    }


def fingerprints(job, storage):
    return {stage.name: planned.fingerprint for stage, planned in job.plan(storage)}


def test_job_orders_stages_after_what_they_need(corpus):
    job = JobSpec.build("j", stages(corpus), ClusterSpec())
    assert [stage.name for stage in job.stages] == ["data", "model", "page", "figures"]


def test_job_plan_is_the_same_wherever_storage_and_corpus_lie(corpus, tmp_path):
    moved = tmp_path / "elsewhere.txt"
    moved.write_bytes(corpus.read_bytes())
    here = JobSpec.build("j", stages(corpus), ClusterSpec())
    there = JobSpec.build("j", stages(moved), ClusterSpec())
    assert fingerprints(here, Location.parse(tmp_path / "a")) == fingerprints(
        there, Location.parse(tmp_path / "b")
    )


def test_job_changed_key_changes_only_what_depends_on_it(corpus, tmp_path):
    storage = Location.parse(tmp_path)
    before = fingerprints(JobSpec.build("j", stages(corpus), ClusterSpec()), storage)
    after = fingerprints(JobSpec.build("j", stages(corpus, steps=4), ClusterSpec()), storage)
    assert {name for name in before if before[name] != after[name]} == {"model", "page", "figures"}


def test_job_changed_corpus_changes_everything(corpus, tmp_path):
    storage = Location.parse(tmp_path)
    job = JobSpec.build("j", stages(corpus), ClusterSpec())
    before = fingerprints(job, storage)
    corpus.write_text("one line\nyet another line\n")
    after = fingerprints(job, storage)
    assert all(before[name] != after[name] for name in before)


def test_job_with_a_cycle_names_it(corpus):
    cyclic = stages(corpus)
    cyclic["model"] = JobStage(
        "model", "train", cyclic["model"].spec, {"dataset": StageReference("figures")}
    )
    with pytest.raises(UserError, match="cycle"):
        JobSpec.build("j", cyclic, ClusterSpec())


def test_job_with_an_unknown_reference_names_the_nearest(corpus):
    broken = stages(corpus)
    broken["page"] = JobStage("page", "report", ReportSpec(), {"training": StageReference("modle")})
    with pytest.raises(UserError, match="did you mean 'model'"):
        JobSpec.build("j", broken, ClusterSpec())


def test_job_without_stages_is_refused():
    with pytest.raises(UserError, match="no stages"):
        JobSpec.build("j", {}, ClusterSpec())


def test_plan_refuses_an_unknown_stage_a_missing_and_an_unknown_input(tmp_path):
    storage = Location.parse(tmp_path)
    with pytest.raises(UserError, match="did you mean 'train'"):
        plan("trian", ReportSpec(), {}, storage)
    with pytest.raises(UserError, match="'weights' has no value"):
        plan("evaluate", EvaluateSpec(), {}, storage)
    given = {"training": Input(storage, "1"), "figure": Input(storage, "2")}
    with pytest.raises(UserError, match="did you mean 'figures'"):
        plan("report", ReportSpec(), given, storage)


def test_input_of_an_unfinished_stage_is_refused(tmp_path):
    folder = Location.parse(tmp_path)
    Artifact(folder, "train", "1", {}, {}, "failed", "now").save()
    with pytest.raises(UserError, match="failed, not done"):
        Input.of_folder("training", folder)
    with pytest.raises(UserError, match="is not there"):
        Input.of_folder("training", folder / "nowhere")


def test_run_stage_that_fails_leaves_a_record_that_says_so(tmp_path):
    training = Artifact(
        Location.parse(tmp_path / "t"), "tune", "1", {}, {}, "done", now(), finished_at=now()
    ).save()
    given = {"training": Input(training.folder, training.fingerprint)}
    planned = plan("report", ReportSpec(), given, Location.parse(tmp_path))
    with pytest.raises(UserError, match="tune"):
        run_stage(planned)  # a search is no training: there is nothing to show
    found = Artifact.find(planned.output)
    assert found is not None
    assert found.status == "failed"
