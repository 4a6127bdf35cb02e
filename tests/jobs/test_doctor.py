"""The doctor on a real Ray of this machine and on an emulated cluster of three nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.artifact import versions
from pipeline.doctor.collective import Collective, Place, check_collective
from pipeline.doctor.memory import check_memory, estimate
from pipeline.doctor.nodes import (
    NodeReport,
    check_budget,
    check_tokens,
    check_versions,
)
from pipeline.specs import TrainSpec
from pipeline.training.model import Vocabulary
from tests.pipeline.train_data import train_spec

ROOT = Path(__file__).parents[2]


def node(name="a", cpus=2, gpus=0, memory=8_000_000_000, tokens=True, **changed) -> NodeReport:
    return NodeReport(name * 8, name, versions() | changed, cpus, gpus, memory, tokens)


def spec_of(**values) -> TrainSpec:
    return train_spec(**values)


def test_versions_that_differ_on_one_node_are_wrong_and_named():
    assert check_versions([node(), node("b")]).state == "ok"
    check = check_versions([node(), node("b", torch="1.0")])
    assert check.state == "wrong"
    assert "torch 1.0 on b" in check.found
    assert "constraints.txt" in check.remedy


@pytest.mark.parametrize(
    ("workers", "use_gpu", "nodes", "state"),
    [
        (4, "auto", [node(), node("b")], "ok"),
        (5, "auto", [node(), node("b")], "wrong"),
        (2, True, [node(gpus=1), node("b")], "wrong"),
        (2, True, [node(gpus=1), node("b", gpus=1)], "ok"),
        (2, "auto", [node(gpus=1), node("b")], "warning"),
    ],
)
def test_budget_is_compared_with_the_workers(workers, use_gpu, nodes, state):
    train = spec_of(train__num_workers=workers, train__use_gpu=use_gpu).train
    assert check_budget(nodes, train).state == state


def test_budget_counts_places_not_cpus():
    # Two CPUs a worker: three nodes of three have nine CPUs, but room for three workers.
    nodes = [node(name, cpus=3) for name in "abc"]
    train = spec_of(train__num_workers=4, train__cpus_per_worker=2).train
    assert check_budget(nodes, train).state == "wrong"


def test_cluster_without_tokens_is_wrong():
    assert check_tokens([node(), node("b")]).state == "ok"
    assert check_tokens([node(), node("b", tokens=False)]).state == "wrong"
    assert check_tokens([node(), node("b", tokens=None)]).state == "warning"


@pytest.mark.parametrize(
    ("stage", "precision", "bytes_a_parameter"),
    [
        # On 4 workers: parameters + gradients + Adam's moments and the master; then the bucket.
        (0, "fp32", 4 + 4 + 8),
        (1, "fp32", 4 + 4 + 12 / 4 + 4),
        (2, "fp32", 4 + 4 / 4 + 12 / 4 + 4),
        (3, "fp32", 4 / 4 + 4 / 4 + 12 / 4 + 4),
        (2, "bf16", 2 + 4 / 4 + 12 / 4 + 4),
    ],
)
def test_memory_estimate_follows_the_zero_stage(stage, precision, bytes_a_parameter):
    spec = spec_of(deepspeed__zero_stage=stage, train__precision=precision)
    need = estimate(spec, Vocabulary(300, 300, 0, 1, 2), workers=4)
    state = need.parameters + need.gradients + need.optimizer + need.buckets
    assert state == pytest.approx(bytes_a_parameter * num_parameters(), rel=1e-6)


def num_parameters() -> int:
    import torch

    from della_model import Della
    from pipeline.training.model import della_config

    with torch.device("meta"):
        model = Della(della_config(spec_of(), Vocabulary(300, 300, 0, 1, 2)))
    return sum(p.numel() for p in model.parameters())


def test_memory_is_compared_with_what_the_workers_node_has():
    spec = spec_of()
    need = estimate(spec, Vocabulary(300, 300, 0, 1, 2), workers=2)
    small = int(need.total * 1.1)
    nodes = [node("a", memory=small), node("b", memory=10 * small)]
    places = [Place("a" * 8, small, None), Place("b" * 8, 10 * small, None)]
    assert [c.state for c in check_memory(need, spec, nodes, places)] == ["warning", "ok"]
    both_on_one = [places[0], places[0]]
    (check,) = check_memory(need, spec, nodes, both_on_one)
    assert check.state == "wrong"
    assert "deepspeed=zero3" in check.remedy


def test_collective_with_a_wrong_sum_or_an_error_is_wrong():
    places = [Place("a", 1, None), Place("b", 1, None)]
    good = Collective("gloo", 2, 8_000_000, 0.5, True, places)
    assert check_collective(good).state == "ok"
    assert good.bus_bytes_per_s == pytest.approx(16e6)  # 2 (n − 1) / n of 8 MB in half a second
    assert check_collective(Collective("gloo", 2, 8, 0.5, False, places)).state == "wrong"
    assert "no route" in check_collective(OSError("no route\nto host")).found


def run(*arguments, **environment):
    settings = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | environment
    return subprocess.run(
        [sys.executable, "jobs/doctor.py", *arguments],
        cwd=ROOT,
        env=settings | {"COLUMNS": "240"},
        capture_output=True,
        text=True,
        check=False,
    )


def record_in(output: str) -> dict:
    folder = output.strip().splitlines()[-1].removeprefix("artifact: ")
    return json.loads((Path(folder) / "doctor.json").read_text())


@pytest.mark.slow
def test_doctor_on_a_local_ray_finds_it_fit_and_exits_0(tmp_path):
    done = run("train.num_workers=2", "cluster.num_cpus=2", f"storage={tmp_path}", "vocab_size=300")
    assert done.returncode == 0, done.stdout + done.stderr
    record = record_in(done.stdout)
    states = {check["name"]: check["state"] for check in record["checks"]}
    assert states == dict.fromkeys(
        ["versions", "CPUs and GPUs", "storage", "authentication", "collective", "memory"], "ok"
    )
    assert record["collective"]["is_right"]
    assert record["collective"]["num_workers"] == 2
    assert "GB/s a link" in done.stdout


@pytest.mark.faults
def test_doctor_on_three_nodes_names_what_is_wrong_and_exits_2(tmp_path):
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("three_nodes.py")],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = ""
        while not line.startswith("dashboard "):
            line = server.stdout.readline()
            assert line, "the cluster did not start"
        address = line.split()[2]
        done = run(
            "train.num_workers=3", f"cluster.address={address}", f"storage={tmp_path}",
            "vocab_size=300", RAY_AUTH_MODE="disabled",
        )  # fmt: skip
        assert done.returncode == 2, done.stdout + done.stderr
        record = record_in(done.stdout)
        states = {check["name"]: check["state"] for check in record["checks"]}
        assert states["authentication"] == "wrong"
        assert states["collective"] == "ok"
        assert len({place["node"] for place in record["collective"]["places"]}) == 3
        assert len(record["nodes"]) == 3
        too_many = run(
            "train.num_workers=4", f"cluster.address={address}", f"storage={tmp_path}",
            RAY_AUTH_MODE="disabled",
        )  # fmt: skip
        assert too_many.returncode == 2
        assert "there are places for 3" in too_many.stdout
        assert "Traceback" not in too_many.stderr
    finally:
        server.stdin.close()
        server.wait(timeout=120)
