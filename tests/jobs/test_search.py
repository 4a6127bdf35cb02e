"""A search that is killed, with a trial that fails, then its best one trained and evaluated."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.guards import HANG_S
from tests.jobs.test_chain import ROOT, artifact_of, write_corpus

pytestmark = pytest.mark.slow
JOB = """
name: searched
stages:
  data: {run: preprocess, corpus: text, corpus.train: CORPUS, tokenizer: bpe,
         tokenizer.vocab_size: 300}
  search:
    run: tune
    dataset: ${stage:data}
    search: grid
    search.scheduler: asha
    search.objectives: {evaluated_iw_nll: min, evaluated_mutual_information: max}
    search.evaluate_documents: 16
    search.evaluate_iw_samples: 2
    search.space: {train.learning_rate: {choice: [0.003, 1.0e+20, 0.0001]}}
    num_trials: 3
    model: tiny
    model.context: 64
    train.max_steps: 6
    train.batch_tokens: 256
    train.eval_every: 2
    train.eval_documents: 20
    train.checkpoint_every: 2
    train.num_workers: 2
    deepspeed: zero0
  best:
    {run: train, dataset: "${stage:data}", from_trial: "${stage:search}", model: tiny,
     model.context: 64, train.max_steps: 8, train.batch_tokens: 256, train.num_workers: 2}
  figures:
    {run: evaluate, weights: "${stage:best}", dataset: "${stage:data}", split: test,
     evaluate.iw_samples: 2, evaluate.max_documents: 20, evaluate.iw_curve_documents: 0,
     evaluate.num_samples: 2, evaluate.num_reconstructions: 2, evaluate.probe_documents: 0,
     evaluate.num_interpolations: 0}
"""


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The folder of the finished chain, what it printed, and when trials had ended at the kill."""
    folder = tmp_path_factory.mktemp("search")
    corpus = write_corpus(folder / "corpus.txt", 300)
    (folder / "job.yaml").write_text(JOB.replace("CORPUS", str(corpus)))
    command = [
        sys.executable, ROOT / "jobs" / "run.py", "job=job.yaml", "storage=runs",
        "cluster.num_cpus=2",  # all for its two workers: its driver takes none
    ]  # fmt: skip
    driver = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    summaries = folder / "runs" / "tune"
    until = time.monotonic() + HANG_S
    while not (
        ended := {f: f.stat().st_mtime_ns for f in summaries.glob("*/trials/*/summary.json")}
    ):
        assert time.monotonic() < until, "no trial has ended"
        time.sleep(0.5)
    driver.kill()
    driver.wait()
    driver.stdout.close()
    kept = {file: file.stat().st_mtime_ns for file in ended}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=HANG_S
    )
    return folder, done, kept


def search_folder(searched):
    (folder,) = (searched[0] / "runs" / "tune").iterdir()
    return folder


def test_search_killed_and_restored_keeps_its_finished_trials(searched):
    _, done, ended = searched
    artifact_of(done)
    assert all(file.stat().st_mtime_ns == when for file, when in ended.items())
    trials = json.loads((search_folder(searched) / "trials.json").read_text())
    assert len(trials) == 3
    assert len({trial["settings"]["train.learning_rate"] for trial in trials}) == 3


def test_search_records_a_failing_trial_with_its_reason_and_goes_on(searched):
    trials = json.loads((search_folder(searched) / "trials.json").read_text())
    failed = [trial for trial in trials if trial["state"] == "failed"]
    assert [trial["settings"]["train.learning_rate"] for trial in failed] == [1e20]
    assert "diverged" in failed[0]["error"]
    record = json.loads((search_folder(searched) / "artifact.json").read_text())
    assert record["figures"]["num_failed"] == 1


def test_search_cuts_no_trial_at_its_last_validation(searched):
    trials = json.loads((search_folder(searched) / "trials.json").read_text())
    at_end = [trial for trial in trials if trial["step"] == 6 and trial["state"] != "failed"]
    assert at_end
    for trial in at_end:
        assert trial["state"] == "done"
        assert None not in trial["values"].values()


def test_search_keeps_the_trials_that_no_other_beats(searched):
    folder = search_folder(searched)
    trials = json.loads((folder / "trials.json").read_text())
    measured = [trial for trial in trials if None not in trial["values"].values()]
    assert measured
    for trial in measured:
        nll, information = trial["values"].values()
        beaten = any(
            other["values"]["evaluated_iw_nll"] <= nll
            and other["values"]["evaluated_mutual_information"] >= information
            and other["values"] != trial["values"]
            for other in measured
        )
        assert trial["on_front"] is not beaten
        assert (folder / "front" / f"{trial['trial']}.yaml").is_file() is not beaten


def test_search_best_is_trained_and_evaluated_in_the_chain(searched):
    folder = search_folder(searched)
    best = yaml.safe_load((folder / "best.yaml").read_text())
    (training,) = (searched[0] / "runs" / "train").iterdir()
    spec = json.loads((training / "artifact.json").read_text())["spec"]
    assert spec["train"]["learning_rate"] == best["train.learning_rate"]
    assert spec["train"]["max_steps"] == 8  # the stage's own key wins
    assert (folder / "weights" / "best" / "config.json").is_file()
    (figures,) = (searched[0] / "runs" / "evaluate").iterdir()
    assert json.loads((figures / "artifact.json").read_text())["status"] == "done"


def test_search_page_is_one_file_with_every_panel(searched):
    text = (search_folder(searched) / "report.html").read_text()
    assert "<script" not in text
    assert not re.search(r'(src|href)="https?:', text)
    for part in ("Settings and result of each trial", "over steps", "Pareto front", "diverged"):
        assert part in text
    assert text.count("<svg") >= 3


def test_search_lines_show_how_many_trials_run_at_once(searched):
    log = next(search_folder(searched).glob("log.txt")).read_text()
    assert "3 trials, 1 at once, each with 2 workers" in log
    assert Path(search_folder(searched) / "spent.json").is_file()
