"""Processes that form a gloo group, without Ray."""

from __future__ import annotations

import os
import socket
from functools import partial
from typing import Any

import torch.distributed
from torch import multiprocessing

# They take most of a process's start: a server imports them once, and each process is its fork.
_IMPORTED_ONCE = ["deepspeed", "pipeline.training.worker", "transformers.models.gpt2.modeling_gpt2"]


def start_processes(work: Any, num_workers: int, *arguments: Any) -> None:
    """Run `work(rank, num_workers, *arguments)` in each, in the environment of the first call."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(_IMPORTED_ONCE)
    multiprocessing.start_processes(
        partial(_in_group, work, num_workers, port, arguments),
        nprocs=num_workers,
        start_method="forkserver",
    )


def _in_group(
    work: Any, num_workers: int, port: int, arguments: tuple[Any, ...], rank: int
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_workers),
    }
    torch.distributed.init_process_group("gloo", rank=rank, world_size=num_workers)
    work(rank, num_workers, *arguments)
    torch.distributed.destroy_process_group()
