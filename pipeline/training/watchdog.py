"""A worker that makes no step for too long ends itself, so that Ray Train starts it again."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable

# A thread of Python's cannot run while a call keeps the interpreter's lock; then faulthandler's,
# which needs no lock, ends the process this much later.
_BACKSTOP_S = 10.0
_STDERR = 2  # a worker's sys.stderr may have no file


class Watchdog:
    """Ends this process when `pet` was not called for `limit_s` seconds.

    The stacks of all its threads go to standard error first, and one sentence to `say`.

    Args:
        limit_s: the time limit in seconds; None: there is none.
        say: where the sentence goes.
        who: the worker, for the sentence.
    """

    def __init__(self, limit_s: float | None, say: Callable[[str], None], who: str) -> None:
        self._limit_s, self._say, self._who = limit_s, say, who
        self._petted = time.monotonic()
        self._closed = threading.Event()
        if limit_s is not None:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def pet(self) -> None:
        """Tell that the worker goes on."""
        self._petted = time.monotonic()

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()
        if self._limit_s is not None:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        assert self._limit_s is not None
        while not self._closed.is_set():
            left_s = self._petted + self._limit_s - time.monotonic()
            if left_s <= 0:
                self._end()
            with contextlib.suppress(OSError):
                faulthandler.dump_traceback_later(left_s + _BACKSTOP_S, exit=True, file=_STDERR)
            self._closed.wait(max(left_s, 0.0))

    def _end(self) -> None:
        if self._closed.is_set():
            return
        self._say(
            f"warning: {self._who} has made no step for {self._limit_s:g} s "
            "(train.step_timeout_s): it hangs, and the workers are started again from the last "
            "checkpoint"
        )
        time.sleep(0.5)  # the sentence leaves in a message of its own
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(file=_STDERR)
        os._exit(1)
