"""An all_reduce over all workers of a real Ray Train worker group: its result and its bandwidth."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.doctor.checks import Check
from pipeline.doctor.nodes import free_memory
from pipeline.errors import first_line
from pipeline.specs import OptimizationSpec
from pipeline.storage import Location

_ROUNDS = 5
_TIMEOUT_S = 120  # of one collective; ports that are closed between nodes make it wait
_FILE = "collective.json"


@dataclass(frozen=True)
class Place:
    """Where one worker ran, and what it could have had there."""

    node: str
    memory_bytes: int
    gpu_bytes: int | None  # free on its GPU


@dataclass(frozen=True)
class Collective:
    """What the workers measured."""

    backend: str
    num_workers: int
    bytes: int  # of the tensor that is summed
    seconds: float  # the fastest round
    is_right: bool
    places: list[Place]

    @property
    def bus_bytes_per_s(self) -> float:
        """What each link carries: a ring sends 2(n − 1)/n of the tensor."""
        n = self.num_workers
        return 2 * (n - 1) / n * self.bytes / self.seconds


def measure(
    train: OptimizationSpec, workers: int, use_gpu: bool, num_bytes: int, output: Location
) -> Collective:
    """Start the workers as training does, sum a tensor over them, and stop them.

    Args:
        train: what one worker takes.
        workers: how many.
        use_gpu: whether each has a GPU; then NCCL carries the sum, else gloo.
        num_bytes: of the tensor.
        output: where the workers write what they measured.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        _on_worker,
        train_loop_config={"bytes": num_bytes, "file": output / _FILE},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": train.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name="collective",
            storage_path=output.path,
            storage_filesystem=None if output.is_local else output.filesystem,
            failure_config=FailureConfig(max_failures=0),
        ),
    ).fit()
    record = (output / _FILE).read_json()
    return Collective(**record | {"places": [Place(**place) for place in record["places"]]})


def _on_worker(config: dict[str, Any]) -> None:
    import ray
    import ray.train
    import ray.train.torch
    import torch
    import torch.distributed as dist

    device = ray.train.torch.get_device()
    gpu_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    own = Place(ray.get_runtime_context().get_node_id(), free_memory(), gpu_bytes)
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, own)
    took = []
    is_right = True
    for _ in range(_ROUNDS):
        tensor = torch.full((config["bytes"] // 4,), float(dist.get_rank() + 1), device=device)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
        expected = dist.get_world_size() * (dist.get_world_size() + 1) / 2
        is_right &= bool((tensor == expected).all())
    if dist.get_rank() == 0:
        found = Collective(
            dist.get_backend(), len(places), config["bytes"], min(took), is_right, places
        )
        config["file"].write_json(asdict(replace(found, places=[])) | {
            "places": [asdict(place) for place in places]
        })  # fmt: skip


def check_collective(found: Collective | Exception) -> Check:
    """Whether the workers reach each other, and how fast."""
    name = "collective"
    if isinstance(found, Exception):
        return Check(
            name, "wrong", f"the workers' all_reduce failed ({first_line(found)})",
            "see that the nodes reach each other on all ports (and with NCCL that "
            "NCCL_SOCKET_IFNAME names the right network); cluster.verbose=true shows their logs",
        )  # fmt: skip
    if not found.is_right:
        return Check(
            name, "wrong", f"{found.backend} gave a wrong sum over {found.num_workers} workers",
            "see that all nodes have the same torch, drivers and network plugin: gradients would "
            "be wrong",
        )  # fmt: skip
    nodes = len({place.node for place in found.places})
    if found.num_workers == 1:
        return Check(name, "ok", f"{found.backend}: one worker, nothing to send")
    return Check(
        name,
        "ok",
        f"{found.backend} over {found.num_workers} workers on {nodes} node(s): "
        f"{found.bytes / 1e6:,.0f} MB summed in {found.seconds:.3f} s, "
        f"{found.bus_bytes_per_s / 1e9:.2f} GB/s a link",
    )
