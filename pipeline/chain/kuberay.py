"""A job as a manifest for KubeRay: the cluster it needs, and the command that it runs there."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from pipeline.artifact import versions
from pipeline.errors import UserError
from pipeline.specs.render import PodSpec, RenderSpec

CODE = "/opt/della"  # where docker/Dockerfile puts it
_VOLUME = "storage"


def manifest(job: str, arguments: Sequence[str], storage: str, spec: RenderSpec) -> str:
    """YAML that `kubectl apply -f -` takes.

    Args:
        job: the job's name.
        arguments: of `jobs/run.py`.
        storage: where artifacts lie; not opened, since this machine may not reach it.
        spec: the cluster.

    Raises:
        UserError: if the pods would write to a folder that vanishes with them.
    """
    _require_lasting(storage, spec)
    name = spec.name or job.replace("_", "-").lower()
    cluster = _cluster(spec)
    body = cluster if spec.kind == "RayCluster" else _job(arguments, cluster, spec)
    document = {
        "apiVersion": "ray.io/v1",
        "kind": spec.kind,
        "metadata": {
            "name": name,
            "namespace": spec.namespace,
            "labels": {"app.kubernetes.io/name": "della", "app.kubernetes.io/instance": name},
        },
        "spec": body,
    }
    return yaml.safe_dump(document, sort_keys=False, width=100)


def _require_lasting(storage: str, spec: RenderSpec) -> None:
    inside = f"{storage}/".startswith(f"{spec.volume_path.rstrip('/')}/")
    if "://" not in storage and not (spec.volume_claim and inside):
        raise UserError(
            f"storage={storage} is a folder of one pod, which vanishes with it: expected a URI "
            "such as s3://bucket/runs, or render.volume_claim=NAME of a volume that many nodes may "
            f"write, with storage below {spec.volume_path}."
        )


def _job(arguments: Sequence[str], cluster: dict[str, Any], spec: RenderSpec) -> dict[str, Any]:
    command = " ".join(["python", "jobs/run.py", *(shlex.quote(each) for each in arguments)])
    body: dict[str, Any] = {
        "entrypoint": f"sh -c {shlex.quote(f'cd {CODE} && {command}')}",
        "submissionMode": "K8sJobMode",
        "runtimeEnvYAML": yaml.safe_dump({"env_vars": {"PYTHONPATH": CODE} | spec.env}),
        # A lost cluster comes back as a new one; what is done is found, what ran goes on.
        "backoffLimit": spec.backoff_limit,
        "submitterConfig": {"backoffLimit": spec.backoff_limit},
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": spec.keep_s,
    }
    if spec.deadline_s is not None:
        body["activeDeadlineSeconds"] = spec.deadline_s
    return body | {"rayClusterSpec": cluster}


def _cluster(spec: RenderSpec) -> dict[str, Any]:
    body: dict[str, Any] = {"rayVersion": versions()["ray"]}
    if spec.token_auth:
        body["authOptions"] = {"mode": "token"}
    body["headGroupSpec"] = {
        "rayStartParams": {"dashboard-host": "0.0.0.0"},
        "template": _pod("ray-head", spec.head, spec, head=True),
    }
    if spec.workers:
        body["workerGroupSpecs"] = [
            {
                "groupName": "workers",
                "replicas": spec.workers,
                "minReplicas": spec.workers,
                "maxReplicas": spec.workers,
                "rayStartParams": {},
                "template": _pod("ray-worker", spec.worker, spec, head=False),
            }
        ]
    return body


def _pod(name: str, pod: PodSpec, spec: RenderSpec, head: bool) -> dict[str, Any]:
    amounts: dict[str, Any] = {"cpu": str(pod.cpus), "memory": pod.memory}
    if pod.gpus:
        amounts["nvidia.com/gpu"] = str(pod.gpus)
    container: dict[str, Any] = {
        "name": name,
        "image": spec.image,
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
    }
    if spec.env:
        container["env"] = [{"name": key, "value": value} for key, value in spec.env.items()]
    if spec.secrets:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in spec.secrets]
    if head:
        container["ports"] = [
            {"containerPort": port, "name": what}
            for what, port in (("gcs-server", 6379), ("dashboard", 8265), ("client", 10001))
        ]
    inner: dict[str, Any] = {"containers": [container]}
    if spec.service_account:
        inner["serviceAccountName"] = spec.service_account
    if spec.volume_claim:
        container["volumeMounts"] = [{"name": _VOLUME, "mountPath": spec.volume_path}]
        claim = {"claimName": spec.volume_claim}
        inner["volumes"] = [{"name": _VOLUME, "persistentVolumeClaim": claim}]
    return {"spec": inner}
