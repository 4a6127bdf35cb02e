"""The Ray that a stage runs on: reaching it, and checking before a run that it is enough."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, first_line
from pipeline.specs.cluster import ClusterSpec
from pipeline.storage import Location

ROOT = Path(__file__).resolve().parents[1]
LOCAL_RAY = "DELLA_LOCAL_RAY"  # set: the Ray of RAY_ADDRESS was started by one of our processes
_PACKAGES = ("pipeline", "della_model")
_started_here = threading.Event()


@contextmanager
def connected(spec: ClusterSpec) -> Iterator[None]:
    """Be connected to Ray while the body runs; a Ray that was up before is left up.

    Raises:
        UserError: if the cluster at `spec.address` cannot be reached.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    # Ray reads these when it is imported or started; a user's own setting wins.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _start(spec)
    try:
        yield
    finally:
        ray.shutdown()
        _started_here.clear()


def _start(spec: ClusterSpec) -> None:
    import ray

    address = spec.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {
        "log_to_driver": spec.verbose,
        "logging_level": logging.INFO if spec.verbose else logging.ERROR,
    }
    if not spec.verbose:
        logging.getLogger("ray").setLevel(logging.WARNING)
    if address is None:
        # Workers import our code from where it lies, whatever folder the command was given in.
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{before}" if before else str(ROOT)
        # "local": never another cluster that happens to run on this machine.
        ray.init(address="local", num_cpus=spec.num_cpus, **options)
        _started_here.set()
        return
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ and not os.environ.get(LOCAL_RAY):
        # Outside `ray job submit` nothing has brought our code to the other nodes yet.
        options["runtime_env"] = {"py_modules": [str(ROOT / name) for name in _PACKAGES]}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at '{address}' ({first_line(error)}): start one with "
            "'ray start --head', or unset cluster.address and RAY_ADDRESS to run on this machine."
        ) from None


def is_local_ray() -> bool:
    """Whether the connected Ray was started by one of our own processes, for this machine alone."""
    return bool(os.environ.get(LOCAL_RAY)) or _started_here.is_set()


def require_cpus(workers: int, cpus_per_worker: int, what: str) -> None:
    """Check that workers fit the cluster together.

    Too few CPUs would not fail: the run would wait for ever.

    Args:
        workers: processes that hold `cpus_per_worker` each for the whole run.
        cpus_per_worker: CPUs of one worker.
        what: the key that sets the number of workers, for the sentence.

    Raises:
        UserError: saying what is needed, what there is and what to set.
    """
    import ray

    total = int(ray.cluster_resources().get("CPU", 0))
    needed = workers * cpus_per_worker
    if needed > total:
        raise UserError(
            f"{what}={workers} needs {needed} CPUs ({workers} x {cpus_per_worker}), but "
            f"the cluster has {total}: it would wait for ever; set {what} to at most "
            f"{total // cpus_per_worker}, or add nodes."
        )


def num_gpus() -> int:
    """GPUs of the connected cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def wants_gpu(use_gpu: bool | str, workers: int, what: str) -> bool:
    """Resolve `use_gpu=auto`, and check that `true` can be had.

    Raises:
        UserError: if GPUs are asked for and the cluster has fewer than workers.
    """
    available = num_gpus()
    if use_gpu is True and available < workers:
        raise UserError(
            f"{what}={workers} with use_gpu=true needs {workers} GPUs, but the cluster has "
            f"{available}: set {what} to at most {available}, or use_gpu=false to run on CPUs."
        )
    return available >= workers if use_gpu == "auto" else bool(use_gpu)


def refuse_storage_that_vanishes(storage: Location) -> None:
    """Refuse a storage inside a Ray job's working directory, which Ray deletes with the job.

    Raises:
        UserError: naming the folder and what to set instead.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ or not storage.is_local:
        return
    here = Path.cwd().resolve()
    if Path(storage.path).resolve().is_relative_to(here):
        raise UserError(
            f"storage={storage} lies inside the job's working directory {here}, which Ray deletes "
            "after the job: results would vanish; set storage to a shared folder or a URI such as "
            "s3://bucket/runs."
        )


def require_shared_storage(storage: Location) -> None:
    """Check that every node of the connected cluster can write to the storage that we read.

    Raises:
        UserError: naming the node that cannot.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = storage / f".probe-{uuid.uuid4().hex[:8]}"

    @ray.remote(num_cpus=0)
    def write(file: Location) -> str | None:
        try:
            file.write_bytes(b"probe")
        except OSError as error:
            return str(error)
        return None

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    try:
        answers = ray.get(
            [
                write.options(
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
                ).remote(probe / node)
                for node in nodes
            ]
        )
        for node, problem in zip(nodes, answers, strict=True):
            if problem is None and (probe / node).is_file():
                continue
            why = problem or "what it wrote there cannot be read from the driver: it is not shared"
            raise UserError(
                f"storage={storage} cannot be used from node {node[:8]} ({why}): every node writes "
                "results there; use a folder that all nodes share, or a URI such as s3://bucket."
            )
    finally:
        probe.delete()


def scratch_folder() -> Path:
    """A folder on this node for copies of remote files; the operating system cleans it."""
    folder = Path(tempfile.gettempdir()) / f"della-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
