"""What the pipeline's tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A Ray on this machine, started once for all tests that need one."""
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    import ray

    ray.init(address="local", num_cpus=4, log_to_driver=False)
    yield
    ray.shutdown()
