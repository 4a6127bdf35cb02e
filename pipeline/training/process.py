"""What a worker's process needs before it can train: its device, its threads, DeepSpeed's group."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from typing import Any

import torch

_M_MMAP_THRESHOLD = -3  # of malloc.h


def prepare_process(cpus: int, use_gpu: bool) -> torch.device:
    """Set this process up for one worker; return the device that it computes on.

    Call it before anything imports DeepSpeed, which picks its accelerator at import.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if use_gpu else "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not use_gpu:
        torch.set_num_threads(cpus)
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def return_freed_memory() -> None:
    """Let glibc give large blocks back to the system as soon as they are free.

    By default it keeps blocks of up to 32 MiB for later: under ZeRO-3 on CPU as much again as what
    a worker holds. It costs time, so it is for those who chose ZeRO-3, hence memory over time.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def joined_deepspeed() -> Any:
    """The module `deepspeed`, using the process group of `torch.distributed`, which must be up.

    Before whatever else of DeepSpeed: without a group it takes itself for the only worker, and
    only `deepspeed.initialize` looks for one. Nothing is compiled: gloo carries the collectives on
    CPU in place of DeepSpeed's shared-memory ones, and torch's AdamW the update.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Present before its first use, this keeps DeepSpeed from probing for compilers.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {"deepspeed_shm_comm": False})
    deepspeed.init_distributed(
        torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False
    )
    return deepspeed
