"""What a stage will take, from what is known of its inputs and from earlier runs of its shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.artifact import Artifact, digest, flatten
from pipeline.chain.changes import Records
from pipeline.progress import duration
from pipeline.runner import Planned
from pipeline.shards import MANIFEST
from pipeline.specs import EvaluateSpec, PreprocessSpec, TrainSpec, TuneSpec
from pipeline.storage import Location

# Keys that say how much is done or in which order, not how long one unit of it takes.
_NOT_SHAPE = (
    "train.max_steps", "train.max_epochs", "train.seed", "train.learning_rate",
    "train.free_bits", "evaluate.max_documents", "evaluate.seed", "num_trials", "title", "split",
)  # fmt: skip
# Bytes of training state a parameter: float32 weight and gradient, and Adam's two moments.
_STATE_BYTES = 16


@dataclass(frozen=True)
class Estimate:
    """None stands for what nobody knows yet."""

    rows: int | None = None
    tokens: int | None = None
    steps: int | None = None
    memory_bytes: int | None = None  # of training state over all workers, without activations
    time_s: float | None = None

    def __str__(self) -> str:
        parts = [
            f"{value:,} {name}"
            for name, value in (("rows", self.rows), ("tokens", self.tokens), ("steps", self.steps))
            if value is not None
        ]
        if self.memory_bytes is not None:
            parts.append(f"state {self.memory_bytes / 1e9:.2g} GB")
        if self.time_s is not None:
            parts.append(f"about {duration(self.time_s)}")
        return ", ".join(parts)


def estimate(planned: Planned, records: Records) -> Estimate:
    """Say what a stage will take; nothing is run."""
    earlier = next(
        (a for a in records.done(planned.kind.name) if shape(a.spec) == _shape_of(planned)), None
    )
    spec = planned.spec
    if isinstance(spec, PreprocessSpec):
        return _of_preprocess(spec, earlier)
    if isinstance(spec, TrainSpec):
        return _of_training(spec, planned.inputs, earlier, records)
    if isinstance(spec, TuneSpec):
        return _of_search(spec, planned.inputs, earlier, records)
    if isinstance(spec, EvaluateSpec):
        return _of_evaluation(spec, planned.inputs, earlier)
    return Estimate(time_s=earlier.took_s if earlier else None)


def shape(spec: Mapping[str, Any]) -> str:
    """Two runs of one shape take the same time a row, a step, or a document."""
    return digest({k: v for k, v in flatten(spec).items() if _is_shape(k)})


def _is_shape(key: str) -> bool:
    return key.removeprefix("trial.") not in _NOT_SHAPE and not key.startswith("cluster.")


def _shape_of(planned: Planned) -> str:
    return shape(planned.spec.model_dump(mode="json"))


def _of_preprocess(spec: PreprocessSpec, earlier: Artifact | None) -> Estimate:
    from pipeline.corpora import index_corpus

    lines = [unit.lines for unit in index_corpus(spec.corpus, spec.shard_bytes).units]
    known = [count for count in lines if count is not None]
    rows = sum(known) if len(known) == len(lines) else None
    if earlier is None or rows is None:
        return Estimate(rows=rows)
    splits = (earlier.folder / MANIFEST).read_json()["splits"].values()
    before = max(sum(split["documents"] for split in splits), 1)
    tokens = rows * sum(split["tokens"] for split in splits) // before
    time_s = earlier.took_s * rows / before if earlier.took_s is not None else None
    return Estimate(rows=rows, tokens=tokens, time_s=time_s)


def _of_training(
    spec: TrainSpec,
    inputs: Mapping[str, Location],
    earlier: Artifact | None,
    records: Records,
) -> Estimate:
    split = _split(inputs, "train")
    steps = spec.train.max_steps
    if steps is None and split is not None and spec.train.max_epochs is not None:
        # At least: a batch is filled up to its budget, never over it.
        steps = spec.train.max_epochs * -(-split["tokens"] // spec.train.batch_tokens)
    parameters = _parameters(spec, earlier, records)
    time_s = None
    if earlier is not None and steps is not None and earlier.figures.get("steps"):
        time_s = (earlier.took_s or 0.0) * steps / earlier.figures["steps"]
    return Estimate(
        rows=split["documents"] if split else None,
        tokens=steps * spec.train.batch_tokens if steps is not None else None,
        steps=steps,
        memory_bytes=parameters * _STATE_BYTES if parameters is not None else None,
        time_s=time_s,
    )


def _parameters(spec: TrainSpec, earlier: Artifact | None, records: Records) -> int | None:
    """Of this model, if any run has counted them."""
    model = spec.model.model_dump(mode="json")
    same = [a for a in records.done("train") if a.spec.get("model") == model]
    for run in ([earlier] if earlier is not None else []) + same:
        if "num_parameters" in run.figures:
            return int(run.figures["num_parameters"])
    return None


def _of_search(
    spec: TuneSpec, inputs: Mapping[str, Location], earlier: Artifact | None, records: Records
) -> Estimate:
    one = _of_training(spec.trial, inputs, None, records)
    trials = spec.planned_trials
    time_s = None
    if earlier is not None and earlier.figures.get("num_trials"):
        time_s = (earlier.took_s or 0.0) * trials / earlier.figures["num_trials"]
    return Estimate(
        rows=one.rows,
        tokens=one.tokens * trials if one.tokens is not None else None,
        steps=one.steps * trials if one.steps is not None else None,
        memory_bytes=one.memory_bytes,
        time_s=time_s,
    )


def _of_evaluation(
    spec: EvaluateSpec, inputs: Mapping[str, Location], earlier: Artifact | None
) -> Estimate:
    split = _split(inputs, spec.split)
    if split is None:
        return Estimate()
    rows = min(split["documents"], spec.evaluate.max_documents or split["documents"])
    time_s = None
    if earlier is not None and earlier.figures.get("num_documents"):
        time_s = (earlier.took_s or 0.0) * rows / earlier.figures["num_documents"]
    return Estimate(rows=rows, tokens=split["tokens"] * rows // split["documents"], time_s=time_s)


def _split(inputs: Mapping[str, Location], name: str) -> dict[str, Any] | None:
    """A split's counts from the dataset's manifest, once there is one."""
    dataset = inputs.get("dataset")
    file = dataset / MANIFEST if dataset is not None else None
    if file is None or not file.is_file():
        return None
    found: dict[str, Any] | None = file.read_json()["splits"].get(name)
    return found
