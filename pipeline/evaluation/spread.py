"""Blocks spread over Ray actors: how many there are, and what each of them has."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.cluster import num_gpus, require_cpus, wants_gpu
from pipeline.errors import UserError, user_error_within
from pipeline.evaluation.blocks import Arrays, Block
from pipeline.evaluation.worker import Evaluator
from pipeline.specs.evaluate import EvaluationSpec
from pipeline.storage import Location

if TYPE_CHECKING:
    from pipeline.shards import Split

_KEY = "evaluate.num_workers"
_RESTARTS = 3  # of one worker, after its process or node died


@dataclass(frozen=True)
class Workers:
    """How many actors, and what each holds."""

    count: int
    cpus: int
    gpu: bool


def plan_workers(settings: EvaluationSpec, num_blocks: int) -> Workers:
    """Size the crew on the connected Ray: an actor a GPU, or an actor a CPU.

    A given `num_workers` on CPUs shares out the CPUs of the smallest node, or of the cluster.

    Raises:
        UserError: if the cluster has not what was asked for.
    """
    import ray

    blocks = max(num_blocks, 1)
    if wants_gpu(settings.use_gpu, settings.num_workers or 1, _KEY):
        count = settings.num_workers or num_gpus()
        return Workers(min(count, blocks), 1, gpu=True)
    if settings.num_workers is not None:
        require_cpus(settings.num_workers, 1, _KEY)
    # What others hold now may stay held: an actor that waits for it would wait for ever.
    free = max(1, int(ray.available_resources().get("CPU", 0)))
    count = min(settings.num_workers or free, blocks)
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    smallest = int(min((cpus for cpus in nodes if cpus >= 1), default=1))
    return Workers(count, max(1, min(free // count, smallest)), gpu=False)


@contextmanager
def started(
    workers: Workers,
    weights: Location,
    split: Split,
    num_documents: int,
    settings: EvaluationSpec,
) -> Iterator[list[Any]]:
    """Have actors with an `Evaluator` each, while the body runs."""
    import ray

    remote = ray.remote(Evaluator).options(
        # Within a trial of a search: not in the share of a CPU that the trial's driver has.
        scheduling_strategy="DEFAULT",
        num_cpus=workers.cpus,
        num_gpus=1 if workers.gpu else 0,
        max_restarts=_RESTARTS,
        max_task_retries=_RESTARTS,
    )
    device = "cuda" if workers.gpu else "cpu"
    threads = None if workers.gpu else workers.cpus
    actors = [
        remote.remote(weights, split, num_documents, settings, device, threads)
        for _ in range(workers.count)
    ]
    try:
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


def evaluated(
    actors: Sequence[Any], blocks: Sequence[Block], given: Any = None
) -> Iterator[tuple[Block, Arrays]]:
    """Blocks with their results, as they are done. An actor gets work when it is ready for it.

    Args:
        actors: of `started`.
        blocks: what is to be done.
        given: what every block needs beside itself; stored once for all of them.

    Raises:
        UserError: what a worker raised, without Ray's wrapping.
    """
    import ray

    arguments = () if given is None else (ray.put(given),)
    waiting = deque(blocks)
    running: dict[Any, tuple[Any, Block | None]] = {
        actor.ready.remote(): (actor, None) for actor in actors
    }
    left = len(blocks)
    while left:
        (reference,), _ = ray.wait(list(running), num_returns=1)
        actor, block = running.pop(reference)
        result = _fetched(reference)
        if block is not None:
            left -= 1
            yield block, result
        if waiting:
            following = waiting.popleft()
            running[actor.run.remote(following, *arguments)] = (actor, following)


def _fetched(reference: Any) -> Any:
    """What a worker returned.

    Raises:
        UserError: what the worker raised, without Ray's wrapping.
    """
    import ray

    try:
        return ray.get(reference)
    except Exception as error:
        user_error = user_error_within(error)
        if user_error is None:
            raise
        raise UserError(user_error.message) from None
