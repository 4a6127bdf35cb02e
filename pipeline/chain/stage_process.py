"""One stage of a chain, in a process of its own: what `pipeline.chain.launch` starts.

    python -m pipeline.chain.stage_process

What to do stands in the environment, as the JSON of a `Request`. Exit codes are the jobs' own: 0
done, 2 something the user can put right, 1 a failure, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.artifact import Artifact
from pipeline.errors import user_error_within
from pipeline.runner import Label, Planned, kind_of, run_stage
from pipeline.secrets import redacted
from pipeline.specs import ClusterSpec
from pipeline.storage import Location

REQUEST = "DELLA_STAGE"
LIFELINE = "DELLA_LIFELINE"  # set: end when standard input closes, since our starter is gone
_GRACE_S = 20.0


@dataclass(frozen=True)
class Request:
    """A planned stage as plain values, which travel through an environment variable."""

    kind: str
    spec: dict[str, Any]
    inputs: dict[str, str]
    input_fingerprints: dict[str, str]
    input_files: dict[str, dict[str, str]]
    fingerprint: str
    output: str
    job: str | None
    name: str | None
    force: bool

    @classmethod
    def of(cls, planned: Planned, label: Label, force: bool) -> Request:
        """Write a planned stage down."""
        return cls(
            kind=planned.kind.name,
            spec=planned.spec.model_dump(mode="json"),
            inputs={name: str(folder) for name, folder in planned.inputs.items()},
            input_fingerprints=planned.input_fingerprints,
            input_files=planned.input_files,
            fingerprint=planned.fingerprint,
            output=str(planned.output),
            job=label.job,
            name=label.name,
            force=force,
        )

    def to_json(self) -> str:
        """The text that `read` understands."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Request:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))

    def run(self) -> Artifact:
        """Run the stage on the Ray that this process was started for."""
        kind = kind_of(self.kind)
        spec = kind.spec.build(self.spec, self.kind)
        if "RAY_ADDRESS" in os.environ and "cluster" in type(spec).model_fields:
            cluster = ClusterSpec(verbose=spec.cluster.verbose)  # type: ignore[attr-defined]
            spec = spec.model_copy(update={"cluster": cluster})
        output = Location.parse(self.output)
        planned = Planned(
            kind=kind,
            spec=spec,
            inputs={name: Location.parse(folder) for name, folder in self.inputs.items()},
            input_fingerprints=self.input_fingerprints,
            input_files=self.input_files,
            fingerprint=self.fingerprint,
            output=output,
            found=Artifact.find(output),
        )
        return run_stage(planned, Label(self.job, self.name), self.force)


def main() -> int:
    """Run the stage that the environment names; return the exit code."""
    if os.environ.pop(LIFELINE, None):
        threading.Thread(target=_end_with_our_starter, daemon=True).start()
    request = Request.read(os.environ.pop(REQUEST))
    try:
        request.run()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        return 130
    except Exception as error:
        user_error = user_error_within(error)
        if user_error is None:
            print(redacted(traceback.format_exc()), file=sys.stderr, flush=True)
            return 1
        print(f"error: {redacted(user_error.message)}", file=sys.stderr, flush=True)
        return 2
    return 0


def _end_with_our_starter() -> None:
    """When the process that started us dies, nobody is left to stop us: so do it ourselves."""
    while os.read(0, 1):  # not through sys.stdin, whose lock would be held when Python ends
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(_GRACE_S)
    os._exit(130)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.exit(code)
