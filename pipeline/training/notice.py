"""Notices that a run is to be interrupted, and the agreement of all workers on the step for it.

A worker is told in three ways: by SIGTERM to its process; by Ray, when its node is being drained;
by the driver. Whoever is told, all stop after the same step, with a checkpoint of it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import ray.train
import torch
import torch.distributed

_ASK_RAY_EVERY_S = 2.0


class Notice(IntEnum):
    """Why the workers are to stop; where several apply, the highest counts."""

    NONE = 0
    RESIZE = 1  # the number of workers is about to change
    PREEMPTED = 2  # a worker or its node is about to be taken away
    STOPPED = 3  # the driver was asked to end


class InterruptedRunError(Exception):
    """The workers stopped on notice, after a checkpoint."""

    def __init__(self, notice: Notice, step: int) -> None:
        super().__init__(notice, step)
        self.notice, self.step = notice, step

    def __str__(self) -> str:
        return f"training was interrupted at step {self.step}: {self.notice.name.lower()}"


class _Terminated:
    """Whether this process was sent SIGTERM while it trains."""

    def __init__(self) -> None:
        self.noticed = threading.Event()
        self._grace_s: float | None = None  # None: it does not train

    def watch(self, grace_s: float) -> None:
        self._grace_s = grace_s

    def unwatch(self) -> None:
        self._grace_s = None

    def on_signal(self, number: int, frame: Any) -> None:
        """The signal's handler: a first SIGTERM leaves time for a checkpoint."""
        del number, frame
        if self._grace_s is None or self.noticed.is_set():
            os._exit(1)
        self.noticed.set()
        timer = threading.Timer(self._grace_s, os._exit, (1,))
        timer.daemon = True
        timer.start()


_terminated = _Terminated()


def handle_sigterm() -> None:
    """Take a SIGTERM as a notice; call it on the process's main thread."""
    signal.signal(signal.SIGTERM, _terminated.on_signal)


class Notices:
    """What this worker was told, and what all agree on.

    Args:
        device: where the workers' collectives run.
        grace_s: how long after a SIGTERM the process stays, for the checkpoint.
        asked: what the driver asks of this worker; None: nothing.
    """

    def __init__(
        self, device: torch.device, grace_s: float, asked: Callable[[], str | None]
    ) -> None:
        self._device, self._asked = device, asked
        self._asked_ray_at = time.monotonic()
        _terminated.watch(grace_s)

    def agreed(self) -> Notice:
        """The most pressing notice of any worker. A collective call, once a step."""
        due = time.monotonic() - self._asked_ray_at >= _ASK_RAY_EVERY_S
        flags = torch.tensor([int(self._mine()), int(due)], device=self._device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        notice, ask_ray = flags.tolist()
        if ask_ray:  # a barrier over all workers, so all must come here together
            self._asked_ray_at = time.monotonic()
            if ray.train.get_preemption_info() is not None:
                return max(Notice(notice), Notice.PREEMPTED)
        return Notice(notice)

    def close(self) -> None:
        """From here on a SIGTERM ends the process at once."""
        _terminated.unwatch()

    def _mine(self) -> Notice:
        asked = self._asked()
        if asked is not None:
            return Notice[asked]
        return Notice.PREEMPTED if _terminated.noticed.is_set() else Notice.NONE
