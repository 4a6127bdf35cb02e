"""Progress as plain lines: how far, how fast, how long still."""

from __future__ import annotations

import io

from rich.console import Console

import pipeline.progress
from pipeline.progress import Progress, duration


def lines(monkeypatch, updates, total=100):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(pipeline.progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with Progress("work", total, "rows", Console(file=stream, width=200)) as progress:
        for done, notes in updates:
            progress.update(done, **notes)
    return stream.getvalue().splitlines()


def test_progress_says_how_far_how_fast_and_what_is_left(monkeypatch):
    first, last = lines(monkeypatch, [(20, {}), (60, {"loss": 1.2345})])
    assert first.startswith("work  20%  20/100 rows")
    assert last.startswith("work  60%  60/100 rows")
    assert "loss 1.23" in last
    assert last.endswith("left")


def test_progress_at_its_end_is_said_once(monkeypatch):
    shown = lines(monkeypatch, [(50, {}), (100, {})])
    assert sum("100%" in line for line in shown) == 1
    assert "took" in shown[-1]


def test_progress_leaves_earlier_work_out_of_the_rate(monkeypatch):
    shown = lines(
        monkeypatch, [(90, {"resumed": 90}), (91, {"resumed": 90}), (92, {"resumed": 90})]
    )
    rate = float(shown[-1].split("rows  ")[1].split(" rows/s")[0])
    assert rate < 0.2  # one row in some ten-second ticks, not ninety-one


def test_duration_is_said_as_people_do():
    assert [duration(s) for s in (7, 185, 7800)] == ["7s", "3m 05s", "2h 10m"]
