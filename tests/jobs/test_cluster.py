"""The jobs on a cluster: `ray job submit` for real, three nodes, token authentication.

The nodes are processes on this machine; the project is not installed in their environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.artifact import Artifact
from pipeline.chain.stage_log import read_log
from pipeline.lease import holder_of
from pipeline.storage import Location
from tests.guards import HANG_S
from tests.jobs.s3_server import s3_server

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def s3():
    """A real S3 server on loopback; yields the environment in which S3 means this server."""
    with s3_server() as environment:
        yield environment


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, s3):
    """A head and two more nodes; yields the environment of a client and the dashboard's address."""
    token = tmp_path_factory.mktemp("auth") / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    environment = {
        **os.environ,
        **s3,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    environment.pop("RAY_ADDRESS", None)
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("three_nodes.py")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    line = ""
    while not line.startswith("dashboard "):
        line = server.stdout.readline()
        assert line, "the cluster did not start"
    yield environment, line.split()[1]
    server.stdin.close()
    server.wait(timeout=60)


@pytest.fixture
def corpus(tmp_path):
    words = "the a small large dog cat sees hears and or red blue house tree".split()
    lines = [
        " ".join(words[(i * 7 + j * j) % len(words)] for j in range(3 + i % 11))
        for i in range(1200)
    ]
    file = tmp_path / "corpus.txt"
    file.write_text("\n".join(lines) + "\n")
    return file


def submit(cluster, *command):
    environment, address = cluster
    submission = ["ray", "job", "submit", "--address", address, "--working-dir", str(ROOT), "--"]
    for _ in range(20):
        done = subprocess.run(
            [*submission, *command],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=HANG_S,
        )
        if "No available agent" not in done.stderr:
            break
        time.sleep(1)  # the head answers before its job agent is up
    return done


def test_submitted_chain_on_three_nodes_keeps_all_on_s3(cluster, corpus):
    storage = Location.parse("s3://bucket/runs")
    (Location.parse("s3://bucket/corpus") / "train.txt").write_bytes(corpus.read_bytes())
    command = [
        "python", "jobs/run.py", "job=demo", f"storage={storage}",
        "data.corpus=text", "data.corpus.train=s3://bucket/corpus/train.txt",
        "data.tokenizer.vocab_size=300", "model.train.max_steps=4", "model.train.num_workers=3",
        "model.train.eval_every=2", "model.train.checkpoint_every=2",
        # A Ray job of its own among stages of the chain's process.
        "figures.submit=true", "figures.evaluate.iw_samples=2", "figures.evaluate.max_documents=20",
        "figures.evaluate.iw_curve_documents=0", "figures.evaluate.num_samples=2",
        "figures.evaluate.num_reconstructions=2", "figures.evaluate.probe_documents=0",
        "figures.evaluate.num_interpolations=0",
    ]  # fmt: skip
    done = submit(cluster, *command)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    assert "artifact: " in output
    assert "figures: evaluate in Ray job demo-figures-" in output
    (training,) = (storage / "train").children()
    artifact = Artifact.load(training)
    assert artifact.status == "done"
    assert artifact.figures["num_workers"] == 3
    assert artifact.figures["num_nodes"] == 3
    (page,) = (storage / "report").children()
    assert (page / "report.html").info().size > 1000
    (figures,) = (storage / "evaluate").children()
    assert "IW-NLL" in read_log(figures)
    assert holder_of(figures) is None


def test_submitted_job_with_storage_in_its_working_directory_is_refused(cluster):
    done = submit(cluster, "python", "jobs/run.py", "job=demo", "storage=runs")
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "results would vanish" in output
    assert "Traceback" not in output


def test_submitted_job_with_more_workers_than_cpus_is_refused(cluster, corpus, tmp_path):
    command = [
        "python", "jobs/run.py", "job=demo", f"storage={tmp_path / 'runs'}",
        "data.corpus=text", f"data.corpus.train={corpus}", "data.tokenizer.vocab_size=300",
        "model.train.num_workers=60",
    ]  # fmt: skip
    done = submit(cluster, *command)
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "train.num_workers=60 needs 60 CPUs" in output
    assert "Traceback" not in output


def test_client_without_the_token_is_turned_away(cluster, tmp_path):
    environment, address = cluster
    wrong = tmp_path / "token"
    wrong.write_text("ffffffffffffffffffffffffffffffff")
    done = subprocess.run(
        ["ray", "job", "list", "--address", address],
        env={**environment, "RAY_AUTH_TOKEN_PATH": str(wrong)},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )
    assert done.returncode != 0
