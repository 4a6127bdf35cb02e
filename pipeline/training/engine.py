"""DeepSpeed's engine around the objective. Imported in workers only: it imports DeepSpeed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from della_model import Della
from pipeline.specs import TrainSpec
from pipeline.training.model import build_objective
from pipeline.training.process import joined_deepspeed


def start_engine(spec: TrainSpec, model: Della, config: dict[str, Any]) -> Any:
    """Shard the model and its optimizer as the spec says; return a DeepSpeed engine.

    Under ZeRO stage 3 a pretrained backbone comes sharded (`pipeline.training.sharded`). A model
    from scratch is built whole in main memory first, and DeepSpeed moves and shards it parameter by
    parameter: its initialisation reaches over several modules, whose weights must be there.

    `torch.distributed` must be up.
    """
    deepspeed = joined_deepspeed()
    objective = build_objective(spec, model)
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=torch.optim.AdamW(
            parameter_groups(objective, spec.train.weight_decay),
            lr=spec.train.learning_rate,
            betas=(spec.train.adam_beta1, spec.train.adam_beta2),
        ),
        config=config,
        dist_init_required=False,
    )
    keep_grad_norm(engine)
    return engine


def keep_grad_norm(engine: Any) -> None:
    """Make stage 0 in float32 do with the gradient's norm what the other stages do.

    They keep it, and make no update when it is not finite. DeepSpeed's own `clip_fp32_gradients`
    clips in the same way, but throws the norm away.
    """

    def clip() -> None:
        parameters = list(engine.module.parameters())
        norm = nn.utils.clip_grad_norm_(parameters, engine.gradient_clipping())
        engine._global_grad_norm = norm
        if not torch.isfinite(norm):
            for parameter in parameters:  # without a gradient, an optimizer passes it over
                parameter.grad = None

    engine.clip_fp32_gradients = clip


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices; none for biases, norms and other vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if len(shape_of(p)) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if len(shape_of(p)) < 2], "weight_decay": 0.0},
    ]


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """A parameter's shape, also of one that is sharded, which itself shows none."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Set the learning rate of the next update."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def grad_norm(engine: Any) -> float:
    """Norm of the last step's gradient over all workers, before clipping.

    The same on every worker.
    """
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def made_update(engine: Any) -> bool:
    """Whether the last step changed the weights: on no worker where the gradient is not finite."""
    norm = engine.get_global_grad_norm()
    return norm is None or math.isfinite(float(norm))


def full_state_dict(engine: Any, on_this_rank: bool) -> dict[str, torch.Tensor]:
    """The model's weights in float32 on the CPU, from whatever ZeRO stage; {} on other ranks.

    A collective call: every rank must make it. Ranks other than the one that keeps the weights
    hold one parameter at a time.
    """
    model: Della = engine.module.model
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        full = full_tensor(parameter, on_this_rank)
        if full is not None:
            state[name] = full
    if on_this_rank:
        state |= {name: buffer.cpu().clone() for name, buffer in persistent_buffers(model)}
    return state


def full_tensor(parameter: nn.Parameter, on_this_rank: bool) -> torch.Tensor | None:
    """One parameter whole, in float32 on the CPU; None on other ranks. A collective call."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    # bfloat16 weights have a float32 master, which the next update starts from; frozen ones none.
    master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if master is not None:
        return master.float().cpu().clone() if on_this_rank else None
    gathered = [parameter] if hasattr(parameter, "ds_id") else []
    with deepspeed.zero.GatheredParameters(gathered, enabled=bool(gathered)):
        return parameter.detach().float().cpu().clone() if on_this_rank else None


def persistent_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Buffers that belong to the state dict."""
    kept = set(model.state_dict(keep_vars=True))
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]
