"""What a manifest for KubeRay says of the cluster that a job gets."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.specs.base import Spec


class PodSpec(Spec):
    """One kind of pod: what each asks for, and how many there are."""

    cpus: int = Field(4, gt=0)
    gpus: int = Field(0, ge=0)
    memory: str = Field("16Gi", pattern=r"^\d+(\.\d+)?(Ki|Mi|Gi|Ti)$")


class RenderSpec(Spec):
    """A manifest of a RayJob, or of the RayCluster alone."""

    kind: Literal["RayJob", "RayCluster"] = "RayJob"
    name: str | None = Field(None, pattern=r"^[a-z]([-a-z0-9]{0,44}[a-z0-9])?$")  # None: the job's
    namespace: str = "default"
    image: str = "della:latest"  # of docker/Dockerfile
    service_account: str | None = None
    head: PodSpec = PodSpec()
    worker: PodSpec = PodSpec()
    workers: int = Field(2, ge=0)
    # Each retry of KubeRay's makes a new cluster; the job goes on from what the last one left.
    backoff_limit: int = Field(3, ge=0)
    deadline_s: int | None = Field(None, gt=0)
    keep_s: int = Field(300, ge=0)  # the cluster stays so long after the job, for its logs
    token_auth: bool = True
    env: dict[str, str] = Field(default_factory=dict)
    secrets: list[str] = Field(default_factory=list)  # whose keys become environment variables
    # A PersistentVolumeClaim that many nodes may write, and where it is mounted.
    volume_claim: str | None = None
    volume_path: str = "/mnt/della"
