"""The commands of README on a small corpus, as a user gives them: each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.guards import HANG_S

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SMALL = [
    "data.tokenizer.vocab_size=300", "model.train.max_steps=6", "model.train.batch_tokens=512",
    "model.train.eval_every=3", "model.train.checkpoint_every=3", "model.train.eval_documents=40",
    "figures.evaluate.iw_samples=3", "figures.evaluate.max_documents=40",
    "figures.evaluate.iw_curve=[1,3]", "figures.evaluate.iw_curve_documents=5",
    "figures.evaluate.num_samples=9", "figures.evaluate.num_reconstructions=9",
]  # fmt: skip


def run(*command, cwd):
    job, *arguments = map(str, command)
    return subprocess.run(
        [sys.executable, ROOT / "jobs" / f"{job}.py", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )


def artifact_of(done):
    assert done.returncode == 0, done.stderr[-4000:]
    *_, last = done.stdout.strip().splitlines()
    assert last.startswith("artifact: ")
    return Path(last.removeprefix("artifact: "))


def write_corpus(path, number_of_lines=900, shift=0):
    words = "the a small large dog cat sees hears and or red blue house tree".split()
    lines = [
        " ".join(words[(i * 7 + j * j + shift) % len(words)] for j in range(3 + i % 11))
        for i in range(number_of_lines)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folder of a finished small `job=demo`, and the command that made it."""
    folder = tmp_path_factory.mktemp("chain")
    corpus = write_corpus(folder / "corpus.txt")
    command = [
        "run", "job=demo", f"storage={folder / 'runs'}", "data.corpus=text",
        f"data.corpus.train={corpus}", *SMALL,
    ]  # fmt: skip
    done = run(*command, cwd=folder)
    page = artifact_of(done)
    assert (page / "report.html").stat().st_size > 10_000
    return folder, command, done


def stage_folder(chain, stage):
    (folder,) = (chain[0] / "runs" / stage).iterdir()
    return folder


def test_chain_shows_progress_tables_and_texts(chain):
    output = chain[2].stdout
    for shown in ("tokenise", "train", "steps", "IW-NLL", "−ELBO", "KL", "Sampled", "report.html"):
        assert shown in output


def test_chain_again_runs_nothing(chain):
    folder, command, _ = chain
    again = run(*command, cwd=folder)
    artifact_of(again)
    assert again.stdout.count("already done") == 4
    assert "steps/s" not in again.stdout


def test_chain_with_another_key_reuses_what_does_not_depend_on_it(chain):
    folder, command, _ = chain
    done = run(*command, "action=plan", "figures.evaluate.iw_samples=4", cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "│" in line]
    states = {line.split("│")[1].strip(): line.split("│")[3].strip() for line in lines}
    states.pop("", None)
    assert states["data"] == states["model"] == "done"
    assert states["figures"] == states["page"] == "stale"


@pytest.mark.faults
def test_chain_killed_at_every_stage_goes_on(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.txt", 300)
    command = [
        sys.executable, ROOT / "jobs" / "run.py", "job=demo", f"storage={tmp_path / 'runs'}",
        "data.corpus=text", f"data.corpus.train={corpus}", *SMALL, "model.train.num_workers=1",
    ]  # fmt: skip
    for stage in ("data", "model", "figures", "page"):
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
        for line in driver.stdout:
            if line.startswith(f"[{stage}: ") and " in process " in line:
                break
        else:
            pytest.fail(f"stage {stage} was never started")
        child = int(line.split(" in process ")[1].split(",")[0].rstrip("]\n"))
        driver.kill()
        driver.wait()
        driver.stdout.close()
        # The stage ends with its driver, so that nothing runs on unseen.
        psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], timeout=40)
        assert not psutil.pid_exists(child)
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=HANG_S
    )
    artifact_of(done)
    rows = [*(tmp_path / "runs" / "train").glob("*/metrics.jsonl")]
    assert len(rows) == 1  # one folder: what was killed was gone on with
    valid = [row["step"] for row in map(json.loads, rows[0].read_text().splitlines())
             if row["kind"] == "valid"]  # fmt: skip
    assert valid == [3, 6]


DEAF = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]  # as a script's shell starts in the background


@pytest.mark.parametrize(
    ("started_by", "setting", "printed", "live"),
    [
        ([], "model.train.max_steps=100000", "/100,000 steps", "/100,000 steps"),
        (DEAF, "figures.evaluate.iw_samples=100000", "evaluate in process", "running"),
    ],
)
def test_chain_cancelled_from_elsewhere_stops_and_goes_on(
    tmp_path, started_by, setting, printed, live
):
    corpus = write_corpus(tmp_path / "corpus.txt", 300)
    command = [
        sys.executable, ROOT / "jobs" / "run.py", "job=demo", f"storage={tmp_path / 'runs'}",
        "data.corpus=text", f"data.corpus.train={corpus}", *SMALL, "model.train.num_workers=1",
        setting,
    ]  # fmt: skip

    def action(name):
        return subprocess.run(
            [*command, f"action={name}"],
            cwd=tmp_path, capture_output=True, text=True, check=False, timeout=HANG_S,
        ).stdout  # fmt: skip

    output = tmp_path / "output.txt"
    with output.open("w") as file:
        driver = subprocess.Popen([*started_by, *command], stdout=file, cwd=tmp_path)
    try:
        until = time.monotonic() + HANG_S
        # What another process sees, once it has begun.
        while printed not in output.read_text() or live not in (running := action("status")):
            assert driver.poll() is None, output.read_text()[-4000:]
            assert time.monotonic() < until, output.read_text()[-4000:]
            time.sleep(0.2)
        assert "running" in running
        assert "asked process" in action("cancel")
        assert driver.wait(timeout=60) == 130
    finally:
        driver.kill()
        driver.wait()
    assert "cancelled" in action("status")
    assert "it goes on from what it left" in action("plan")
    assert printed in action("logs")


def test_chain_status_tells_what_ran(chain):
    folder, command, _ = chain
    done = run(*command, "action=status", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 4


def test_chain_figures_are_consistent(chain):
    figures = json.loads((stage_folder(chain, "evaluate") / "artifact.json").read_text())["figures"]
    names = [
        "reconstruction_nll", "kl", "kl_per_layer", "negative_elbo", "iw_nll", "ppl_token",
        "ppl_word", "num_documents", "num_tokens", "num_words",
    ]  # fmt: skip
    assert set(names) <= set(figures)
    assert figures["kl"] == pytest.approx(sum(figures["kl_per_layer"]))
    negative_elbo = figures["reconstruction_nll"] + figures["kl"]
    assert figures["negative_elbo"] == pytest.approx(negative_elbo)
    assert figures["num_documents"] == 40


def test_chain_metrics_have_every_validation_once(chain):
    rows = (stage_folder(chain, "train") / "metrics.jsonl").read_text().splitlines()
    valid = [row["step"] for row in map(json.loads, rows) if row["kind"] == "valid"]
    assert valid == [3, 6]


def test_generate_samples_and_reconstructs(chain, tmp_path):
    weights = stage_folder(chain, "train")
    sampled = run("generate", f"weights={weights}", "mode=sample", "num=5", cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    again = run("generate", f"weights={weights}", "mode=sample", "num=5", cwd=tmp_path)
    assert again.stdout == sampled.stdout
    source = tmp_path / "input.txt"
    source.write_text("the small dog sees\na cat hears\n")
    rebuilt = run(
        "generate", f"weights={weights}", "mode=reconstruct", f"input={source}", cwd=tmp_path
    )
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert "the small dog sees" in rebuilt.stdout


def test_evaluate_on_a_dataset_of_another_tokenizer_is_refused(chain, tmp_path):
    corpus = write_corpus(tmp_path / "other.txt", shift=3)
    command = [
        f"corpus.train={corpus}", "corpus=text", "tokenizer.vocab_size=290", "storage=runs",
    ]  # fmt: skip
    other = artifact_of(run("preprocess", *command, cwd=tmp_path))
    weights = stage_folder(chain, "train")
    done = run("evaluate", f"weights={weights}", f"dataset={other}", "storage=runs", cwd=tmp_path)
    assert done.returncode == 2
    assert "tokenizer" in done.stderr
    assert "Traceback" not in done.stderr


def test_train_on_more_workers_than_cpus_is_refused(chain, tmp_path):
    dataset = stage_folder(chain, "preprocess")
    done = run(
        "train", f"dataset={dataset}", "train.max_steps=2", "train.num_workers=99", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "train.num_workers=99 needs 99 CPUs" in done.stderr


def test_train_with_too_short_a_context_is_refused(chain, tmp_path):
    dataset = stage_folder(chain, "preprocess")
    done = run("train", f"dataset={dataset}", "train.max_steps=2", "model.context=5", cwd=tmp_path)
    assert done.returncode == 2
    assert "set model.context=" in done.stderr


def test_tune_by_its_own_command_finds_the_best_trial(chain, tmp_path):
    dataset = stage_folder(chain, "preprocess")
    settings = [
        f"dataset={dataset}", "storage=runs", "train.max_steps=4", "train.eval_every=2",
        "train.batch_tokens=512", "train.eval_documents=40", "model.context=64",
    ]  # fmt: skip
    search = artifact_of(run("tune", *settings, "num_trials=2", cwd=tmp_path))
    record = json.loads((search / "artifact.json").read_text())
    trials = json.loads((search / "trials.json").read_text())
    assert len(trials) == record["figures"]["num_trials"] == 2
    assert all(trial["error"] is None for trial in trials)
    values = [trial["values"]["valid_negative_elbo"] for trial in trials]
    assert record["figures"]["best_value"] == min(values)
    best = yaml.safe_load((search / "best.yaml").read_text())
    first = trials[values.index(min(values))]
    assert best["train.learning_rate"] == first["settings"]["train.learning_rate"]


def test_tune_on_an_unknown_key_is_refused_before_anything_starts(chain, tmp_path):
    dataset = stage_folder(chain, "preprocess")
    done = run(
        "tune", f"dataset={dataset}", "train.max_steps=2", "storage=runs",
        "search.space={train.learning_rat: {uniform: [0.1, 0.2]}}", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "did you mean 'learning_rate'" in done.stderr
