"""A manifest for KubeRay: against its published fields and types, and what it says."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from pipeline.chain.kuberay import CODE, manifest
from pipeline.errors import UserError
from pipeline.specs.render import RenderSpec

SCHEMA = yaml.safe_load((Path(__file__).parent / "fixtures" / "kuberay_v1.yaml").read_text())
PLAIN = {"string": str, "integer": int, "number": (int, float), "boolean": bool}
ROOT = Path(__file__).parents[2]
FULL = {
    "image": "registry.example/della:1", "service_account": "trainer", "deadline_s": 3600,
    "worker": {"cpus": 8, "gpus": 2, "memory": "64Gi"}, "env": {"AWS_REGION": "eu-west-1"},
    "secrets": ["s3-keys"], "volume_claim": "shared",
}  # fmt: skip


def check(value, kind, where="manifest"):
    """Refuse a field that KubeRay does not know, one that is missing, and a wrong type."""
    kind = kind.rstrip("!")
    if kind.startswith("["):
        assert isinstance(value, list), where
        for index, item in enumerate(value):
            check(item, kind[1:-1], f"{where}[{index}]")
    elif kind.startswith("{"):
        assert isinstance(value, dict), where
        for key, item in value.items():
            check(item, kind[1:-1], f"{where}.{key}")
    elif kind in PLAIN:
        assert isinstance(value, PLAIN[kind]), f"{where} is {value!r}, not {kind}"
        assert kind != "integer" or not isinstance(value, bool), where
    elif isinstance(SCHEMA[kind], list):
        assert value in SCHEMA[kind], where
    else:
        fields = SCHEMA[kind]
        assert value.keys() <= fields.keys(), f"{where}: {value.keys() - fields.keys()}"
        for name, inner in fields.items():
            assert name in value or not inner.endswith("!"), f"{where}.{name} is missing"
            if name in value:
                check(value[name], inner, f"{where}.{name}")


def rendered(arguments=("job=demo",), storage="s3://bucket/runs", **values):
    return yaml.safe_load(manifest("demo", arguments, storage, RenderSpec.build(values)))


@pytest.mark.parametrize("kind", ["RayJob", "RayCluster"])
@pytest.mark.parametrize("values", [{}, FULL, {"token_auth": False, "workers": 0}])
def test_manifest_holds_only_fields_that_kuberay_publishes(kind, values):
    document = rendered(kind=kind, **values)
    check(document, kind)
    assert yaml.safe_load(yaml.safe_dump(document)) == document


@pytest.mark.parametrize(
    "break_it",
    [
        lambda d: d["spec"].update(backofLimit=3),
        lambda d: d["spec"].update(backoffLimit="3"),
        lambda d: d["spec"]["rayClusterSpec"].pop("headGroupSpec"),
        lambda d: d["spec"]["rayClusterSpec"]["authOptions"].update(mode="basic"),
    ],
)
def test_manifest_check_refuses_what_kuberay_would(break_it):
    document = rendered()
    break_it(document)
    with pytest.raises(AssertionError):
        check(document, "RayJob")


def test_manifest_runs_the_job_where_the_image_has_the_code():
    arguments = ["job=demo", "storage=s3://bucket/runs", "data.corpus.train=s3://b/a file.txt"]
    entrypoint = rendered(arguments)["spec"]["entrypoint"]
    shell, flag, script = shlex.split(entrypoint)
    assert (shell, flag) == ("sh", "-c")
    assert script.startswith(f"cd {CODE} && ")
    assert shlex.split(script)[3:] == ["python", "jobs/run.py", *arguments]


def test_manifest_brings_a_lost_cluster_back_with_a_token():
    spec = rendered(backoff_limit=5)["spec"]
    assert spec["backoffLimit"] == 5
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert "authOptions" not in rendered(token_auth=False)["spec"]["rayClusterSpec"]


def test_manifest_asks_gpus_for_workers_alone():
    cluster = rendered(**FULL)["spec"]["rayClusterSpec"]
    (worker,) = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert "nvidia.com/gpu" not in head["resources"]["limits"]


def test_manifest_with_storage_that_vanishes_is_refused():
    with pytest.raises(UserError, match="vanishes with it"):
        rendered(storage="/runs")
    rendered(storage="/mnt/della/runs", volume_claim="shared")


def test_dockerfile_puts_the_code_where_the_manifest_runs_it():
    lines = (ROOT / "docker" / "Dockerfile").read_text().splitlines()
    instructions = [line.split()[0] for line in lines if line[:1].isupper()]
    assert instructions[0] == "FROM"
    assert f"WORKDIR {CODE}" in lines
    base = next(line for line in lines if line.startswith("FROM ")).split()[1]
    assert ":" in base
    assert not base.endswith(":latest")
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert all((ROOT / word).exists() for word in copied)
    assert {"della_model", "pipeline", "jobs", "conf", "constraints.txt"} <= set(copied)
    assert lines[-1] == "USER ray"  # not root
