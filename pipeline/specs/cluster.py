"""Where the stages run: a Ray started here, or a cluster that is already up."""

from __future__ import annotations

from pipeline.specs.base import Spec


class ClusterSpec(Spec):
    """How to reach Ray, and how much of it a stage started on this machine takes."""

    # None: the cluster of RAY_ADDRESS when there is one (inside `ray job submit`), else this
    # machine. "auto": the cluster already running here. Or an address, "ray://…" or "host:port".
    address: str | None = None
    num_cpus: int | None = None
    # Show Ray's own log lines and the workers' output.
    verbose: bool = False
