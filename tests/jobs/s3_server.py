"""A real S3 server on loopback, for tests of storage that is no folder."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pyarrow import fs

from tests.jobs.three_nodes import free_ports


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Serve `s3://bucket`; yields the environment in which S3 means this server."""
    (port,) = free_ports(1)
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            _make_bucket(server)
            yield environment
    finally:
        server.terminate()
        server.wait(timeout=30)


def _make_bucket(server: subprocess.Popen[bytes]) -> None:
    for _ in range(60):
        assert server.poll() is None, "the S3 server has ended"
        try:
            filesystem, _ = fs.FileSystem.from_uri("s3://bucket/?allow_bucket_creation=true")
            filesystem.create_dir("bucket")
            return
        except OSError:
            time.sleep(0.5)  # it is not up yet
    pytest.fail("the S3 server did not answer")
