"""A job being run: order, failures, retries, limits, double starts. Its stages are real pages."""

from __future__ import annotations

import threading

import pytest

from pipeline.artifact import Artifact
from pipeline.chain.driver import Chain, Selection
from pipeline.chain.job_spec import JobStage
from pipeline.chain.room import Share
from pipeline.chain.stage_log import read_log
from pipeline.errors import UserError
from pipeline.specs import TrainSpec
from pipeline.storage import Location
from tests.pipeline.chain_data import after, finished_run, job_of, page

ROOM = Share(2.0)
ALL = Selection()


@pytest.fixture
def storage(tmp_path):
    return Location.parse(tmp_path / "runs")


def chain(job, storage, selection=ALL, lines=None):
    say = (lambda stage, line: lines.append((stage, line))) if lines is not None else ignored
    return Chain(job, storage, selection, ROOM, None, say)


def ignored(*_):
    return None


def planned(job, storage):
    return {stage.name: found for stage, found in job.plan(storage)}


def test_chain_failing_stage_holds_up_its_dependants_alone(tmp_path, storage):
    good, bad = finished_run(tmp_path / "a"), finished_run(tmp_path / "b", "tune")
    job = job_of(
        page("bad", bad, retries=3),
        page("needs_bad", after("bad")),
        page("needs_needs_bad", after("needs_bad")),
        page("good", good),
    )
    outcome = chain(job, storage).run()
    assert outcome.states == {
        "bad": "failed", "needs_bad": "skipped", "needs_needs_bad": "skipped", "good": "done",
    }  # fmt: skip
    assert "tune" in outcome.errors["bad"]
    assert outcome.only_user_errors
    record = planned(job, storage)["bad"].found
    assert record.status == "failed"
    # What the user has to put right is not tried again, whatever `retries` says.
    assert record.attempts == 1
    assert "tune" in record.error
    assert "error: " in read_log(record.folder)


def test_chain_again_finds_all_done_and_force_makes_one_anew(tmp_path, storage):
    job = job_of(
        page("one", finished_run(tmp_path / "a")), page("two", finished_run(tmp_path / "b"))
    )
    chain(job, storage).run()
    first = planned(job, storage)
    (first["one"].output / "left over").write_bytes(b"")
    again = chain(job, storage, Selection(force=["one"])).run()
    assert again.states == {"one": "done", "two": "already done"}
    assert not (first["one"].output / "left over").exists()
    assert chain(job, storage).run().states == {"one": "already done", "two": "already done"}


def test_chain_retries_after_a_limit_and_records_each_attempt(tmp_path, storage):
    job = job_of(page("slow", finished_run(tmp_path / "a"), timeout_s=0.2, retries=1, backoff_s=0))
    lines = []
    outcome = chain(job, storage, lines=lines).run()
    assert outcome.states == {"slow": "failed"}
    assert outcome.errors["slow"] == "it took longer than timeout_s=0.2"
    assert not outcome.only_user_errors
    assert sum("report in process" in line for stage, line in lines if stage is None) == 2


def test_chain_started_twice_runs_each_stage_once(tmp_path, storage):
    job = job_of(page("one", finished_run(tmp_path / "a")))
    outcomes = []
    threads = [
        threading.Thread(target=lambda: outcomes.append(chain(job, storage).run()))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [outcome.states["one"] for outcome in outcomes] == ["done", "done"]
    log = read_log(planned(job, storage)["one"].output)
    assert log.count("report.html") == 1  # the stage says where its page is, once
    assert Artifact.load(planned(job, storage)["one"].output).attempts == 1


def test_chain_only_and_from_choose_stages_and_want_their_inputs(tmp_path, storage):
    run = finished_run(tmp_path / "a")
    job = job_of(page("a", run, "1"), page("b", after("a"), "2"), page("c", after("b"), "3"))
    assert [s.name for s in Selection(start="b").chosen(job)] == ["b", "c"]
    assert [s.name for s in Selection(only=["c", "a"]).chosen(job)] == ["a", "c"]
    with pytest.raises(UserError, match="'b' reads 'a', which is not done"):
        chain(job, storage, Selection(start="b")).run()
    with pytest.raises(UserError, match="exclude each other"):
        Selection(start="b", only=["c"]).chosen(job)
    with pytest.raises(UserError, match="has no stage 'd'"):
        Selection(force=["d"]).chosen(job)


def test_chain_of_more_than_the_cluster_has_is_refused_with_its_place(
    tmp_path, storage, monkeypatch
):
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    spec = TrainSpec.build({"model": {"size": "tiny"}, "train": {"max_steps": 1, "num_workers": 9}})
    data = finished_run(tmp_path / "data", "preprocess")
    job = job_of(JobStage("model", "train", spec, {"dataset": data}, place="job.yaml:4"))
    with pytest.raises(UserError, match=r"^job.yaml:4: stage 'model': train.num_workers=9 needs 9"):
        chain(job, storage).run()
