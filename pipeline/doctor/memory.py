"""Memory that a worker will need, by what it is for, and whether its node has it.

DeepSpeed's estimators hold for half-precision training on GPUs; ours follow this pipeline's own
config (`pipeline.training.deepspeed_config`): float32 or bfloat16 with a float32 master, Adam.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from pipeline.doctor.checks import Check, gigabytes
from pipeline.doctor.collective import Place
from pipeline.doctor.nodes import NodeReport, hosts
from pipeline.specs import TrainSpec
from pipeline.training.model import Vocabulary

if TYPE_CHECKING:
    from della_model import DellaConfig

_PROCESS_BYTES = 600e6  # Python, torch, Ray and DeepSpeed in one worker, measured on CPU
_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in elements
# Values that one layer keeps for the backward pass, for each token and each unit of width
# (Korthikanti et al. 2022, equation 1, without the attention matrix, which is never kept whole).
_KEPT_PER_UNIT = 17
_PASSES = 2  # a document goes through the backbone as encoder and as decoder
_TIGHT = 0.8  # of the memory there is: more is worth a warning


@dataclass(frozen=True)
class Need:
    """Bytes of one worker."""

    parameters: float
    gradients: float
    optimizer: float
    buckets: float  # in which gradients are sent
    activations: float
    process: float

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(asdict(self).values()))


def estimate(spec: TrainSpec, vocabulary: Vocabulary, workers: int) -> Need:
    """Estimate what a worker needs; the model is built without memory.

    Raises:
        UserError: if the model's settings are refused.
    """
    import torch

    from della_model import Della
    from pipeline.training.model import della_config
    from pipeline.training.setup import count_parameters
    from pipeline.training.trainable import set_trainable

    config = della_config(spec, vocabulary)
    with torch.device("meta"):
        model = Della(config)
        set_trainable(model, spec.train)
    counts = count_parameters(model)
    stage, share = spec.deepspeed.zero_stage, 1 / workers
    width = 2 if spec.train.precision == "bf16" else 4
    trained = counts.trained
    has_master = stage > 0 or spec.train.precision == "bf16"
    return Need(
        parameters=counts.total * width * (share if stage == 3 else 1),
        gradients=trained * 4 * (share if stage >= 2 else 1),
        optimizer=trained * (12 if has_master else 8) * (share if stage >= 1 else 1),
        buckets=min(trained, _BUCKET) * 4 if stage >= 1 and workers > 1 else 0,
        activations=_activations(spec, config, width),
        process=_PROCESS_BYTES,
    )


def _activations(spec: TrainSpec, config: DellaConfig, width: int) -> float:
    from della_model.head import MAX_LOGITS

    tokens = spec.train.micro_batch_tokens
    layers, hidden = config.num_layers, config.backbone.hidden_size
    layer = tokens * hidden * width * _KEPT_PER_UNIT
    if spec.train.activation_checkpointing:  # each layer's input, and one layer made again
        kept = tokens * hidden * width * layers * _PASSES + layer
    else:
        kept = layer * layers * _PASSES
    logits = min(tokens * config.backbone.vocab_size, MAX_LOGITS)  # the head's, a chunk at a time
    return float(kept + 2 * logits * 4)  # and their gradient


def check_memory(
    need: Need, spec: TrainSpec, nodes: list[NodeReport], places: list[Place]
) -> list[Check]:
    """Compare with what each node has, for as many workers as it got, or could get."""
    checks = []
    each = spec.train.cpus_per_worker
    got = Counter(place.node for place in places)
    for name, node in hosts(nodes):
        workers = got[node.node] if places else node.cpus // each
        if workers == 0:
            continue
        on_gpu = [p.gpu_bytes for p in places if p.node == node.node and p.gpu_bytes is not None]
        has = min(on_gpu) if on_gpu else node.memory_bytes
        needed = need.total - (need.process if on_gpu else 0)
        needed *= 1 if on_gpu else workers
        checks.append(_compared(name, needed, has, workers, need, bool(on_gpu)))
    return checks


def _compared(node: str, needed: float, has: int, workers: int, need: Need, on_gpu: bool) -> Check:
    what = "GPU memory" if on_gpu else "memory"
    parts = ", ".join(f"{k} {gigabytes(v)}" for k, v in asdict(need).items() if v)
    count = "each of its GPUs" if on_gpu else f"its {workers} worker(s)"
    found = (
        f"{node}: {gigabytes(needed)} estimated for {count}, {gigabytes(has)} free ({parts} a "
        "worker)"
    )
    remedy = (
        "lower train.micro_batch_tokens, set train.activation_checkpointing=true, shard more "
        "(deepspeed=zero3), take a smaller model or add nodes"
    )
    if needed > has:
        return Check(what, "wrong", found, remedy)
    if needed > _TIGHT * has:
        return Check(what, "warning", found, f"it is tight: {remedy}")
    return Check(what, "ok", found)
