"""A lease keeps two from working in one folder, and is taken over from the dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipeline import lease as lease_module
from pipeline.lease import FOLDER, Lease, held, holder_of, machine, request_cancel
from pipeline.storage import Location
from tests.jobs.s3_server import s3_server

HOLD = """
import sys, time
from pipeline.lease import held
from pipeline.storage import Location
nothing = lambda *_: None
with held(Location.parse(sys.argv[1]), progress=nothing, on_wait=nothing, on_cancel=nothing,
          on_lost=nothing):
    print("held", flush=True)
    time.sleep(60)
"""
IN_TURN = """
import sys, time
from pathlib import Path
from pipeline.lease import held
from pipeline.storage import Location
nothing = lambda *_: None
leased, folder = Location.parse(sys.argv[1]), Path(sys.argv[2])
with held(leased, progress=nothing, on_wait=nothing, on_cancel=nothing,
          on_lost=nothing):
    (folder / "inside").mkdir()  # fails when another is inside
    time.sleep(0.2)
    (folder / "inside").rmdir()
"""


def nothing(*_):
    return None


def hold(folder, **calls):
    calls = {"progress": nothing, "on_wait": nothing, "on_cancel": nothing, "on_lost": nothing,
             **calls}  # fmt: skip
    return held(folder, **calls)


@pytest.fixture
def folder(tmp_path):
    return Location.parse(tmp_path)


def write_claim(folder, age_s, **changes):
    """A claim of another machine that was last written `age_s` seconds ago."""
    claim = {
        "number": 1, "host": "elsewhere", "machine": "elsewhere", "pid": 1,
        "process_started": "1", "since": "2020-01-01T00:00:00+00:00", "progress": None, **changes,
    }  # fmt: skip
    file = folder / FOLDER / "0ther.json"
    file.write_json(claim)
    at = time.time() - age_s
    os.utime(file.path, (at, at))
    return file


def test_lease_second_waits_until_the_first_is_done(folder):
    order, waited = [], []
    with hold(folder):
        other = threading.Thread(
            target=lambda: [hold(folder, on_wait=waited.append).__enter__(), order.append("second")]
        )
        other.start()
        time.sleep(0.6)
        order.append("first")
    other.join(timeout=10)
    assert order == ["first", "second"]
    assert [claim.pid for claim in waited] == [os.getpid()]


def in_turn(leased, folder, count):
    """Exit codes of so many processes that want the lease at once; 0: nobody else was inside."""
    command = [sys.executable, "-c", IN_TURN, str(leased), folder]
    running = [subprocess.Popen(command) for _ in range(count)]
    return [process.wait(timeout=120) for process in running]


def test_lease_of_many_processes_is_held_by_one_at_a_time(tmp_path):
    assert in_turn(tmp_path, tmp_path, 4) == [0] * 4
    assert list((tmp_path / FOLDER).iterdir()) == []


@pytest.mark.slow
def test_lease_on_object_storage_is_held_by_one_at_a_time(tmp_path):
    with s3_server():
        leased = Location.parse("s3://bucket/leased")
        assert in_turn(leased, tmp_path, 4) == [0] * 4
        assert list((leased / FOLDER).children()) == []


def test_lease_of_a_killed_process_is_taken_over_at_once(folder):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder.path], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    assert holder_of(folder).pid == holder.pid
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert holder_of(folder) is None
    with hold(folder):
        assert holder_of(folder).pid == os.getpid()


def test_lease_of_a_silent_machine_is_taken_over_by_the_storages_clock(folder):
    dead = write_claim(folder, lease_module.DEAD_AFTER_S + 5)
    with hold(folder):
        assert not dead.exists()


def test_lease_of_a_machine_that_writes_is_waited_for(folder):
    write_claim(folder, age_s=1)
    waited = []
    waiting = Lease(folder, nothing)
    thread = threading.Thread(target=lambda: waiting.acquire(waited.append), daemon=True)
    thread.start()
    time.sleep(0.7)
    assert thread.is_alive()
    assert [claim.host for claim in waited] == ["elsewhere"]
    (folder / FOLDER / "0ther.json").delete()
    thread.join(timeout=5)
    assert not thread.is_alive()
    waiting.release()


def test_lease_waits_for_a_number_that_is_being_taken(folder):
    write_claim(folder, age_s=1, number=None)
    lease = Lease(folder, nothing)
    thread = threading.Thread(target=lambda: lease.acquire(nothing), daemon=True)
    thread.start()
    time.sleep(0.5)
    assert thread.is_alive()
    write_claim(folder, age_s=1, number=9)  # it took a higher one than ours
    thread.join(timeout=5)
    assert not thread.is_alive()
    lease.release()


def test_lease_shows_progress_and_hears_of_a_cancel(folder, monkeypatch):
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.05)
    cancelled = threading.Event()
    with hold(folder, progress=lambda: {"done": 7}, on_cancel=cancelled.set):
        assert holder_of(folder).progress == {"done": 7}
        request_cancel(folder, holder_of(folder))
        assert cancelled.wait(timeout=5)
    assert list((folder / FOLDER).children()) == []


def test_lease_that_was_taken_away_is_noticed(folder, monkeypatch):
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.05)
    lost = threading.Event()
    with hold(folder, on_lost=lost.set) as lease:
        (folder / FOLDER / f"{lease.name}.json").delete()
        assert lost.wait(timeout=5)


def test_lease_of_a_number_used_again_by_another_process_is_dead(folder):
    write_claim(folder, age_s=1, machine=machine(), pid=os.getpid(), process_started="1")
    assert holder_of(folder) is None
    record = json.loads((folder / FOLDER / "0ther.json").read_bytes())
    assert record["pid"] == os.getpid()
