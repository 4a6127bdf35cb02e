"""Starting a stage: as a process of this machine, or as a Ray job through the Jobs API."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from pipeline.chain.stage_process import LIFELINE, REQUEST, Request
from pipeline.cluster import LOCAL_RAY, ROOT, is_local_ray
from pipeline.specs.job import StageOptions

_MODULE = "pipeline.chain.stage_process"
_STOP_S = 20.0  # for a stage to leave its record, before it is killed
_ASK_EVERY_S = 1.0  # the Jobs API is asked over HTTP
_PATIENCE_S = 120.0  # how long it may fail to answer


class Started(Protocol):
    """A stage that was started elsewhere."""

    where: str

    def lines(self) -> list[str]:
        """What it has printed since the last call."""
        ...

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        ...

    def stop(self) -> None:
        """End it: first by asking, then by force. Returns when it has ended."""
        ...


def start(request: Request, options: StageOptions, gcs_address: str | None) -> Started:
    """Start a stage; `gcs_address` is that of the Ray that it shall use."""
    if options.submit:
        assert gcs_address is not None
        return SubmittedStage(request, options, gcs_address)
    return StageProcess(request, gcs_address)


class StageProcess:
    """A stage in a process of this machine, on the Ray that we are connected to."""

    def __init__(self, request: Request, gcs_address: str | None) -> None:
        environment = {
            **os.environ,
            REQUEST: request.to_json(),
            LIFELINE: "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": _with_root(os.environ.get("PYTHONPATH")),
            "COLUMNS": os.environ.get("COLUMNS", "120"),
        }
        if gcs_address is not None:
            environment["RAY_ADDRESS"] = gcs_address
        if is_local_ray():
            environment[LOCAL_RAY] = "1"
        # A session of its own: Ctrl-C in the terminal comes to us alone, and we pass it on.
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.where = f"process {self._process.pid}"
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))

    def lines(self) -> list[str]:
        """What it has printed since the last call."""
        found = []
        while not self._lines.empty():
            found.append(self._lines.get())
        return found

    def poll(self) -> int | None:
        """Its exit code, negative when a signal ended it; None while it runs."""
        code = self._process.poll()
        if code is not None:
            self._reader.join(timeout=2.0)  # what it printed last
            self._close()
        return code

    def stop(self) -> None:
        """Interrupt it; kill it when it does not end."""
        self._signal(signal.SIGINT)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._reader.join(timeout=2.0)
        self._close()

    def _close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _signal(self, number: int) -> None:
        try:
            if number == signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)
        except ProcessLookupError:
            pass


class SubmittedStage:
    """A stage as a Ray job of its own, with its own resources and runtime environment."""

    def __init__(self, request: Request, options: StageOptions, gcs_address: str) -> None:
        from ray.job_submission import JobSubmissionClient

        self._client = JobSubmissionClient(gcs_address)
        name = f"{request.job or 'job'}-{request.name or request.kind}-{uuid.uuid4().hex[:6]}"
        resources = options.resources
        self._id: str = self._client.submit_job(
            entrypoint=f"{sys.executable if is_local_ray() else 'python'} -m {_MODULE}",
            submission_id=name,
            runtime_env=_runtime_env(request, options.runtime_env),
            metadata={"job": request.job or "", "stage": request.name or request.kind},
            entrypoint_num_cpus=resources.driver_cpus or None,
            entrypoint_memory=resources.driver_memory_bytes,
            entrypoint_resources=resources.driver_custom or None,
        )
        self.where = f"Ray job {self._id}"
        self._shown = 0
        self._asked = 0.0
        self._answered = time.monotonic()
        self._code: int | None = None

    def lines(self) -> list[str]:
        """What it has printed since the last call, whole lines; it is asked now and then."""
        if self._code is None and time.monotonic() - self._asked < _ASK_EVERY_S:
            return []
        self._asked = time.monotonic()
        text = self._answer(self._client.get_job_logs, "")[self._shown :]
        if self._code is None:
            text = text[: text.rfind("\n") + 1]
        self._shown += len(text)
        return text.splitlines()

    def poll(self) -> int | None:
        """Its driver's exit code, or None while it runs."""
        if self._code is None and time.monotonic() - self._asked >= _ASK_EVERY_S:
            info = self._answer(self._client.get_job_info, None)
            if info is not None and info.status.is_terminal():
                ended_well = {"SUCCEEDED": 0, "STOPPED": 130}
                self._code = ended_well.get(str(info.status.value), info.driver_exit_code or 1)
        return self._code

    def _answer(self, ask: Callable[[str], Any], otherwise: Any) -> Any:
        """What the Jobs API says of the job; it may fail to answer for a while.

        Raises:
            RuntimeError, OSError: if it has not answered for `_PATIENCE_S`.
        """
        try:
            answer = ask(self._id)
        except (RuntimeError, OSError):  # requests' errors are OSErrors
            if time.monotonic() - self._answered > _PATIENCE_S:
                raise
            return otherwise
        self._answered = time.monotonic()
        return answer

    def stop(self) -> None:
        """Stop the job; Ray kills it when it does not end."""
        self._client.stop_job(self._id)
        until = time.monotonic() + _STOP_S
        while time.monotonic() < until:
            if self._client.get_job_status(self._id).is_terminal():
                return
            time.sleep(0.5)


def _runtime_env(request: Request, own: dict[str, Any]) -> dict[str, Any]:
    """The chain's own runtime environment, or this repository; over it what the stage asks for."""
    submitted = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    base: dict[str, Any] = {}
    if submitted:
        base = json.loads(submitted).get("runtime_env") or {}
    base.setdefault("working_dir", str(ROOT))
    merged = {key: value for key, value in base.items() if not key.startswith("_")} | own
    variables = {**base.get("env_vars", {}), **own.get("env_vars", {})}
    return merged | {"env_vars": variables | {REQUEST: request.to_json(), "PYTHONUNBUFFERED": "1"}}


def _with_root(path: str | None) -> str:
    """PYTHONPATH with our code's root first."""
    parts = [str(ROOT), *(part for part in (path or "").split(os.pathsep) if part)]
    return os.pathsep.join(dict.fromkeys(str(Path(part)) for part in parts))
