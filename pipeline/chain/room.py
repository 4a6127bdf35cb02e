"""What a stage takes of the cluster, and whether it fits beside those that run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.chain.job_spec import JobStage
from pipeline.cluster import num_gpus, require_cpus, wants_gpu
from pipeline.specs import EvaluateSpec, PreprocessSpec, Spec, TrainSpec, TuneSpec


@dataclass(frozen=True)
class Share:
    """CPUs and GPUs that a stage holds, or that a cluster has."""

    cpus: float
    gpus: float = 0.0

    def __add__(self, other: Share) -> Share:
        return Share(self.cpus + other.cpus, self.gpus + other.gpus)

    def fits(self, room: Share) -> bool:
        """Whether `room` has at least this much."""
        return self.cpus <= room.cpus + 1e-6 and self.gpus <= room.gpus + 1e-6


def whole_cluster() -> Share:
    """What the connected cluster has."""
    import ray

    return Share(float(ray.cluster_resources().get("CPU", 0)), num_gpus())


def share_of(stage: JobStage, spec: Spec, cluster: Share) -> Share:
    """What a stage takes while it runs; its entry's `resources` win over what its spec tells.

    Raises:
        UserError: naming the stage and its place, if the cluster has less than it needs.
    """
    with stage.blamed():
        told = _from_spec(spec, cluster)
        given = stage.options.resources
        return Share(
            min(told.cpus if given.cpus is None else given.cpus, cluster.cpus),
            min(told.gpus if given.gpus is None else given.gpus, cluster.gpus),
        )


def _from_spec(spec: Spec, cluster: Share) -> Share:
    if isinstance(spec, TrainSpec):
        return _training(spec)
    if isinstance(spec, TuneSpec):
        trial = _training(spec.trial)
        if spec.max_concurrent is None:  # as many trials as there is room for
            return cluster
        return Share(spec.max_concurrent * trial.cpus, spec.max_concurrent * trial.gpus)
    if isinstance(spec, EvaluateSpec):
        workers = spec.evaluate.num_workers
        if workers is None:  # it takes what is free
            return Share(1.0)
        gpu = wants_gpu(spec.evaluate.use_gpu, workers, "evaluate.num_workers")
        return Share(workers, workers if gpu else 0)
    return Share(1.0 if isinstance(spec, PreprocessSpec) else 0.0)


def _training(spec: TrainSpec) -> Share:
    train, key = spec.train, "train.num_workers"
    require_cpus(train.min_workers, train.cpus_per_worker, key)
    gpu = wants_gpu(train.use_gpu, train.min_workers, key)
    return Share(train.max_workers * train.cpus_per_worker, train.max_workers if gpu else 0)


def room_beside(running: Iterable[Share], cluster: Share) -> Share:
    """What the running stages leave of the cluster."""
    taken = sum(running, Share(0.0))
    return Share(cluster.cpus - taken.cpus, cluster.gpus - taken.gpus)
