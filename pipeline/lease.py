"""A lease on a folder: of all who ask for it, one works there, and the others wait for it to end.

Nothing is needed of the storage but reading, writing and listing whole files, so a lease holds on
object storage as well. Each who asks writes a claim of its own; the order among claims is that of
Lamport's bakery (CACM 1974): take a number above all that are there, then wait for the lower ones.
A claim is written again at every heartbeat. Its age is told by the storage's own clock, as the time
between the last writing of that claim and of ours, so the clocks of machines never meet.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pipeline.storage import Location

HEARTBEAT_S = 2.0
DEAD_AFTER_S = 30.0  # many heartbeats: a slow storage is no death
FOLDER = "lease"
_CANCEL = "cancel-"


@dataclass(frozen=True)
class Claim:
    """One who works in a folder, or waits for it."""

    name: str
    number: int | None  # None while it is being taken
    host: str
    machine: str
    pid: int
    process_started: str
    since: str
    progress: dict[str, Any] | None
    written_s: float  # when the last heartbeat was written, by the storage's clock

    @property
    def holder(self) -> str:
        """Who it is, for a person."""
        return f"process {self.pid} on {self.host}"

    def is_dead(self, now_s: float) -> bool:
        """Whether its process is gone: it stopped writing, or is no longer on this machine.

        Args:
            now_s: the time by the storage's clock.
        """
        if self.machine == machine() and process_start(self.pid) != self.process_started:
            return True
        return now_s - self.written_s > DEAD_AFTER_S


class Lease:
    """Our claim on a folder; `held` is the way to use it."""

    def __init__(self, folder: Location, progress: Callable[[], dict[str, Any] | None]) -> None:
        self._folder = folder / FOLDER
        self._progress = progress
        self.name = uuid.uuid4().hex[:12]
        self._number: int | None = None
        self._since = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None

    @property
    def _file(self) -> Location:
        return self._folder / f"{self.name}.json"

    def acquire(self, on_wait: Callable[[Claim], None]) -> Self:
        """Wait until no other claim comes before ours; `on_wait` hears once of each that does."""
        self._write()
        self._number = 1 + max((claim.number or 0 for claim in self._others()), default=0)
        told: set[str] = set()
        while True:
            self._write()
            ahead = [claim for claim in self._others() if self._comes_before_us(claim)]
            if not ahead:
                return self
            first = min(ahead, key=lambda claim: (claim.number or 0, claim.name))
            if first.name not in told and first.number is not None:
                told.add(first.name)
                on_wait(first)
            time.sleep(0.2 if self._folder.is_local else 1.0)

    def beat(self, on_cancel: Callable[[], None], on_lost: Callable[[], None]) -> None:
        """Keep the claim fresh from a thread of its own, until `release`.

        Args:
            on_cancel: called when someone asked us to stop.
            on_lost: called when the claim is gone or could not be written for too long, so that
                another may have taken over.
        """

        def run() -> None:
            written = time.monotonic()
            while not self._stop.wait(HEARTBEAT_S):
                try:
                    if not self._file.is_file():
                        return on_lost()
                    self._write()
                    written = time.monotonic()
                    if (self._folder / f"{_CANCEL}{self.name}").is_file():
                        return on_cancel()
                except OSError:
                    if time.monotonic() - written > DEAD_AFTER_S:
                        return on_lost()
            return None

        self._beating = threading.Thread(target=run, daemon=True, name="lease")
        self._beating.start()

    def release(self) -> None:
        """Take the claim back."""
        self._stop.set()
        if self._beating is not None:
            self._beating.join()
        (self._folder / f"{_CANCEL}{self.name}").delete()
        self._file.delete()

    def _write(self) -> None:
        pid = os.getpid()
        self._file.write_json(
            {
                "number": self._number,
                "host": socket.gethostname(),
                "machine": machine(),
                "pid": pid,
                "process_started": process_start(pid),
                "since": self._since,
                "progress": self._progress(),
            }
        )

    def _others(self) -> list[Claim]:
        """The claims of the living beside ours; those of the dead are cleared away."""
        now_s = _written_s(self._file)
        living = []
        for claim in _claims(self._folder):
            if claim.name == self.name:
                continue
            if claim.is_dead(now_s):
                (self._folder / f"{claim.name}.json").delete()
            else:
                living.append(claim)
        return living

    def _comes_before_us(self, claim: Claim) -> bool:
        assert self._number is not None
        # One that is still taking its number may take a lower one: wait until it is known.
        return claim.number is None or (claim.number, claim.name) < (self._number, self.name)


@contextmanager
def held(
    folder: Location,
    *,
    progress: Callable[[], dict[str, Any] | None],
    on_wait: Callable[[Claim], None],
    on_cancel: Callable[[], None],
    on_lost: Callable[[], None],
) -> Iterator[Lease]:
    """Hold the lease of `folder` while the body runs; waits for whoever holds it now."""
    lease = Lease(folder, progress)
    try:
        lease.acquire(on_wait)
        lease.beat(on_cancel, on_lost)
        yield lease
    finally:
        lease.release()


def holder_of(folder: Location) -> Claim | None:
    """Who works in a folder now, or None; writes nothing.

    Without a claim of our own, the age is told by this machine's clock: a wrong one misleads what
    is shown, and nothing else.
    """
    living = [
        claim
        for claim in _claims(folder / FOLDER)
        if claim.number is not None and not claim.is_dead(time.time())
    ]
    return min(living, key=lambda claim: (claim.number or 0, claim.name), default=None)


def request_cancel(folder: Location, claim: Claim) -> None:
    """Ask the holder of a claim to stop; it looks at every heartbeat."""
    (folder / FOLDER / f"{_CANCEL}{claim.name}").write_bytes(b"")


def _claims(folder: Location) -> list[Claim]:
    found = []
    for file in folder.children():
        if not file.name.endswith(".json"):
            continue
        try:
            written_s, record = _written_s(file), file.read_json()
        except FileNotFoundError:  # its owner has just taken it back
            continue
        found.append(Claim(name=file.name.removesuffix(".json"), written_s=written_s, **record))
    return found


def _written_s(file: Location) -> float:
    """When a file was last written, in seconds, by the storage's clock.

    Raises:
        FileNotFoundError: if it is not there.
    """
    modified = file.info().mtime_ns
    if modified is None:
        raise FileNotFoundError(str(file))
    return float(modified) / 1e9


def machine() -> str:
    """Within what a process number means a process: this host, and in it this container."""
    try:
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def process_start(pid: int) -> str:
    """When a process of this machine started, so that a number used again is not taken for it.

    "" when there is no such process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc").is_dir():
            return ""
        try:  # a system without /proc: whether it is alive is all that can be told
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass
        return "alive"
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state == "Z" else fields[18]
