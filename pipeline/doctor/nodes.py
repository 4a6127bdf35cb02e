"""What each node says of itself, and whether they fit each other and the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifact import versions
from pipeline.cluster import is_local_ray, require_shared_storage
from pipeline.doctor.checks import Check
from pipeline.errors import UserError
from pipeline.specs import OptimizationSpec
from pipeline.storage import Location

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class NodeReport:
    """One node, seen from a task on it."""

    node: str  # Ray's id
    host: str
    versions: dict[str, str]
    cpus: int  # that Ray gives out
    gpus: int
    memory_bytes: int  # that a new process could have
    has_tokens: bool | None  # whether its processes ask for a token; None: cannot be told


def report_nodes() -> list[NodeReport]:
    """Ask every node of the connected cluster."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0)(_report)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked = [
        ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(
            node["NodeID"],
            node["NodeManagerHostname"],
            int(node["Resources"].get("CPU", 0)),
            int(node["Resources"].get("GPU", 0)),
        )
        for node in nodes
    ]
    found: list[NodeReport] = ray.get(asked)
    return found


def _report(node: str, host: str, cpus: int, gpus: int) -> NodeReport:
    return NodeReport(node, host, versions(), cpus, gpus, free_memory(), _has_tokens())


def free_memory() -> int:
    """Bytes that a new process could have: the machine's, or what its container leaves of them."""
    import psutil

    available: int = psutil.virtual_memory().available
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        reclaimable = dict(
            line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines()
        )
        left = int(limit) - used + int(reclaimable.get("inactive_file", 0))
    except (OSError, ValueError):  # no container, or one without a limit
        return available
    return min(available, left)


def _has_tokens() -> bool | None:
    try:
        # Ray has no public way to ask for the mode.
        from ray._private.authentication.authentication_utils import is_token_auth_enabled
    except ImportError:
        return None
    return bool(is_token_auth_enabled())


def check_versions(nodes: list[NodeReport]) -> Check:
    """Whether all nodes and this process run the same code and packages."""
    own = versions()
    differing = [
        f"{package} {node.versions.get(package, 'missing')} on {node.host} ({node.node[:8]}), "
        f"{own.get(package, 'missing')} here"
        for node in nodes
        for package in own.keys() | node.versions.keys()
        if node.versions.get(package) != own.get(package)
    ]
    if differing:
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        return Check(
            "versions",
            "wrong",
            "; ".join(sorted(differing)[:3]) + more,
            "install constraints.txt on every node (pip install -c constraints.txt …): results and "
            "pickled objects differ between versions",
        )
    shown = ", ".join(f"{name} {version}" for name, version in own.items())
    return Check("versions", "ok", f"equal on {len(nodes)} node(s): {shown}")


def check_budget(nodes: list[NodeReport], train: OptimizationSpec) -> Check:
    """Whether the workers find CPUs, and GPUs where they are asked for."""
    workers, each = most_workers(train), train.cpus_per_worker
    places = sum(node.cpus // each for node in nodes)
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    found = f"{cpus} CPUs and {gpus} GPUs on {len(nodes)} node(s)"
    needed = f"{workers} workers of {each} CPU(s)"
    if places < workers:
        return Check(
            "CPUs and GPUs",
            "wrong",
            f"{found}; {needed} do not fit: there are places for {places}",
            f"set train.num_workers to at most {places}, or train.cpus_per_worker lower, or add "
            "nodes: the run would wait for ever",
        )
    if train.use_gpu is True and gpus < workers:
        return Check(
            "CPUs and GPUs",
            "wrong",
            f"{found}; train.use_gpu=true needs {workers} GPUs",
            f"set train.num_workers to at most {gpus}, or train.use_gpu=false",
        )
    if gpus and train.use_gpu == "auto" and gpus < workers:
        return Check(
            "CPUs and GPUs",
            "warning",
            f"{found}; {needed} are more than the GPUs, so training will run on CPUs",
            f"set train.num_workers={gpus} to train on the GPUs",
        )
    if places == workers and train.use_gpu is not True and gpus < workers:
        return Check("CPUs and GPUs", "ok", f"{found}; {needed} take all of them")
    return Check("CPUs and GPUs", "ok", f"{found}; {needed}")


def most_workers(train: OptimizationSpec) -> int:
    """The number of workers that the run may have at most."""
    workers = train.num_workers
    return max(workers) if isinstance(workers, list | tuple) else workers


def check_storage(storage: Location, nodes: list[NodeReport]) -> Check:
    """Whether every node writes to the storage that this process reads."""
    try:
        require_shared_storage(storage)
    except UserError as error:
        found, _, remedy = error.message.partition(": every node ")
        return Check("storage", "wrong", found, f"every node {remedy}" if remedy else "")
    except OSError as error:
        return Check(
            "storage", "wrong", f"{storage}: {error}", "set storage to a folder you can write to"
        )
    return Check("storage", "ok", f"{storage} is written from {len(nodes)} node(s) and read here")


def check_tokens(nodes: list[NodeReport]) -> Check:
    """Whether the cluster asks for a token."""
    if is_local_ray():
        return Check("authentication", "ok", "this machine's own Ray, which ends with the command")
    if all(node.has_tokens for node in nodes):
        return Check("authentication", "ok", "a token is asked for on every node")
    if any(node.has_tokens is None for node in nodes):
        return Check(
            "authentication", "warning", "this version of Ray does not tell its mode",
            "see that RAY_AUTH_MODE=token is set where 'ray start' runs",
        )  # fmt: skip
    without = ", ".join(sorted({node.host for node in nodes if not node.has_tokens}))
    return Check(
        "authentication",
        "wrong",
        f"no token is asked for on {without}",
        "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH before 'ray start' on every node: whoever "
        "reaches the ports can run code there",
    )


def hosts(nodes: list[NodeReport]) -> Iterator[tuple[str, NodeReport]]:
    """Nodes with a name that tells them apart."""
    for node in nodes:
        yield f"{node.host} ({node.node[:8]})", node
