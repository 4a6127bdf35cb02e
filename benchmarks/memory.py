"""The most memory that a process has for itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GIB = 2**30


class PeakMemory:
    """The most memory that a process had for itself while the body ran, in bytes.

    RssAnon, looked at every few milliseconds: mapped files and shared libraries are left out, which
    the kernel may drop.

    Args:
        pid: whose; by default this process's.
    """

    def __init__(self, pid: int | None = None) -> None:
        self.peak = 0
        self._pid = pid
        self._stopped = threading.Event()

    def __enter__(self) -> PeakMemory:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            self.peak = max(self.peak, own_memory(self._pid))
            time.sleep(0.005)


def own_memory(pid: int | None = None) -> int:
    """RssAnon of this process or another, in bytes; 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{pid or 'self'}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    kib = next((line.split()[1] for line in lines if line.startswith("RssAnon:")), "0")
    return int(kib) * 1024


def peak_alone(function: Callable[..., Any], *arguments: Any) -> int:
    """The peak of `function` in a new process of its own, over what its imports take, in bytes."""
    from torch import multiprocessing

    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_watched, args=(answers, function, arguments))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"{function.__name__} ended with {process.exitcode} in its own process")
    peak: int = answers.get()
    return peak


def _watched(answers: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    before = own_memory()
    with PeakMemory() as memory:
        function(*arguments)
    answers.put(memory.peak - before)
