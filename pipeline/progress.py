"""Progress that a person can follow: a live bar in a terminal, a plain line now and then elsewhere.

Work that happens in Ray workers sends its state through a `ProgressMailbox`, a small actor that
the driver reads.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, Self

import rich.progress
from rich.console import Console

PLAIN_EVERY_S = 5.0


class Progress:
    """One task's progress: `with Progress("tokenise", total, "bytes") as p: p.update(done, …)`.

    Args:
        what: the verb that starts the line.
        total: how much there is, or None when nobody knows.
        unit: what is counted: "rows", "tokens", "steps", "documents".
    """

    # Those under way in this process, the newest last.
    _under_way: ClassVar[list[Progress]] = []

    def __init__(
        self, what: str, total: float | None, unit: str, console: Console | None = None
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.console = console or Console()
        self._done = self._resumed = 0.0
        self._first: tuple[float, float] | None = None  # done, and when
        self._printed: float | None = None  # what the last plain line said was done
        self._notes: dict[str, Any] = {}
        self._started = time.monotonic()
        self._last_line = self._started
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def __enter__(self) -> Self:
        self._started = self._last_line = time.monotonic()
        self._under_way.append(self)
        if self.console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.TaskProgressColumn(),
                rich.progress.TextColumn("{task.fields[line]}"),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task(self.what, total=self.total, line="")
            self._bar.start()
        return self

    def update(self, done: float, *, resumed: float = 0.0, **notes: Any) -> None:
        """Set how much is done in all, and the figures that stand beside it.

        The rate counts from the first update with something done, since starting up is no work;
        `resumed` is what an earlier run had done.
        """
        if self._first is None and done > resumed:
            self._first = (done, time.monotonic())
        self._done, self._resumed, self._notes = done, resumed, notes
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=self.total, line=self._line())
        elif time.monotonic() - self._last_line >= PLAIN_EVERY_S:
            self._print_line()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._under_way.remove(self)
        if self._bar is not None:
            self._bar.stop()
        if kind is None and self._printed != self._done:
            self._print_line()

    @classmethod
    def newest(cls) -> dict[str, Any] | None:
        """The state of what is under way in this process, for others to read; None when idle."""
        try:
            shown = cls._under_way[-1]
        except IndexError:
            return None
        return {
            "what": shown.what,
            "done": shown._done,
            "total": shown.total,
            "line": shown._line(),
        }

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        self._printed = self._done
        share = f" {100 * self._done / self.total:3.0f}%" if self.total else ""
        self.console.print(
            f"{self.what}{share}  {self._line()}", soft_wrap=True, highlight=False, markup=False
        )
        sys.stdout.flush()

    def _rate(self, elapsed: float) -> float:
        if self._first is not None and self._done > self._first[0]:
            done, when = self._first
            return (self._done - done) / max(time.monotonic() - when, 1e-9)
        # Before a second look, only work that is over tells a rate: what began may take longer.
        is_over = self.total is not None and self._done >= self.total
        return (self._done - self._resumed) / elapsed if is_over else 0.0

    def _line(self) -> str:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        rate = self._rate(elapsed)
        of = f"/{self.total:,.0f}" if self.total else ""
        parts = [f"{self._done:,.0f}{of} {self.unit}"]
        parts += [f"{_figure(rate)} {self.unit}/s"] if rate else []
        parts += [f"{name} {_figure(value)}" for name, value in self._notes.items()]
        if self.total and rate > 0 and self._done < self.total:
            parts.append(f"{duration((self.total - self._done) / rate)} left")
        elif self.total and self._done >= self.total:
            parts.append(f"took {duration(elapsed)}")
        return "  ".join(parts)


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def duration(seconds: float) -> str:
    """Write seconds as a person says them: '42s', '3m 05s', '2h 10m'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


class _Mailbox:
    """Holds the newest message of a worker, what was said, and what is asked of the workers."""

    def __init__(self) -> None:
        self._message: dict[str, Any] | None = None
        self._said: list[str] = []
        self._asked: str | None = None
        self._training = False

    def put(self, message: dict[str, Any]) -> str | None:
        self._message = message
        return self._asked

    def get(self) -> tuple[dict[str, Any] | None, list[str]]:
        said, self._said = self._said, []
        return self._message, said

    def say(self, text: str) -> None:
        self._said.append(text)

    def ask(self, what: str | None) -> None:
        self._asked = what

    def set_training(self, training: bool) -> None:
        self._training = training

    def is_training(self) -> bool:
        return self._training


class ProgressMailbox:
    """A worker's side of the progress: `mailbox.send(done=…, loss=…)` costs no waiting."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._answer: Any = None  # to the last message, on its way
        self._asked: str | None = None

    @classmethod
    def create(cls) -> ProgressMailbox:
        """Start the actor on the driver's node, which outlives the others; it takes no CPU."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = ray.get_runtime_context().get_node_id()
        strategy = NodeAffinitySchedulingStrategy(here, soft=False)
        actor = ray.remote(num_cpus=0, scheduling_strategy=strategy)(_Mailbox)
        return cls(actor.remote())

    def send(self, done: float, **notes: Any) -> None:
        """Replace the state that the driver shows."""
        self._answer = self._actor.put.remote({"done": done, **notes})

    def say(self, text: str) -> None:
        """Have the driver print a sentence."""
        self._actor.say.remote(text)

    def asked(self) -> str | None:
        """What was asked of the workers, as of the last message that was answered."""
        import ray

        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._asked = ray.get(self._answer)
            self._answer = None
        return self._asked

    def ask(self, what: str | None) -> None:
        """Ask something of the workers; None: nothing any more."""
        import ray

        ray.get(self._actor.ask.remote(what))

    def set_training(self, training: bool) -> None:
        """Tell whether the workers are in their loop."""
        import ray

        ray.get(self._actor.set_training.remote(training))

    def is_training(self) -> bool:
        """Whether the workers are in their loop."""
        import ray

        training: bool = ray.get(self._actor.is_training.remote())
        return training

    def read(self) -> tuple[Mapping[str, Any] | None, list[str]]:
        """The newest state, or None before the first, and what was said since the last look."""
        import ray

        message, said = ray.get(self._actor.get.remote())
        return message, said


@contextmanager
def followed(mailbox: ProgressMailbox, progress: Progress, every_s: float = 0.5) -> Iterator[None]:
    """Show in `progress` what workers send to `mailbox`, while the body runs."""
    stop = threading.Event()

    def look() -> None:
        message, said = mailbox.read()
        for text in said:
            progress.console.print(text, soft_wrap=True, highlight=False, markup=False)
        if message:
            progress.update(**message)

    def follow() -> None:
        while not stop.wait(every_s):
            look()

    thread = threading.Thread(target=follow, daemon=True, name="progress")
    with progress:
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            look()
