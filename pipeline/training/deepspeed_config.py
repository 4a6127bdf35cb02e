"""DeepSpeed's config, as a pure function of the spec.

It stands apart from the engine because the driver checks it too, and a driver must not import
DeepSpeed: on a machine without GPU, in a cluster that has some, the import itself fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError, nearest
from pipeline.specs import DeepSpeedSpec, TrainSpec

# Sections of DeepSpeed 0.19 that make sense beside what the pipeline sets.
KNOWN_SECTIONS = (
    "activation_checkpointing",
    "aio",
    "amp",
    "autotuning",
    "bf16",
    "checkpoint",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "data_types",
    "disable_allgather",
    "dump_state",
    "elasticity",
    "flops_profiler",
    "fp16",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "seq_parallel_communication_data_type",
    "sparse_gradients",
    "steps_per_print",
    "tensorboard",
    "torch_autocast",
    "wall_clock_breakdown",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)

# What a key of the train spec decides already: two places could disagree.
OWNED_SECTIONS = {
    "train_batch_size": "train.batch_tokens",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.batch_tokens and train.micro_batch_tokens",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.learning_rate, train.weight_decay and train.adam_beta1/2",
    "scheduler": "train.warmup_steps and train.decay",
}


def check_extra(spec: DeepSpeedSpec) -> None:
    """Refuse sections that DeepSpeed would ignore or that the train spec decides.

    Raises:
        UserError: naming the first such key, and what to use instead.
    """
    for key in spec.extra:
        if key in OWNED_SECTIONS:
            raise UserError(
                f"deepspeed.extra.{key} is decided by {OWNED_SECTIONS[key]}: set that instead, so "
                "that no two places disagree."
            )
        if key not in KNOWN_SECTIONS:
            known = (*KNOWN_SECTIONS, *OWNED_SECTIONS)
            raise UserError(
                f"deepspeed.extra.{key} is no section of DeepSpeed's config{nearest(key, known)}: "
                f"DeepSpeed would ignore it; the sections are: {', '.join(KNOWN_SECTIONS)}."
            )
    zero = spec.extra.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise UserError(
            f"deepspeed.extra.zero_optimization={zero!r} is refused: expected a table of settings."
        )
    if zero.get("stage", spec.zero_stage) != spec.zero_stage:
        raise UserError(
            f"deepspeed.extra.zero_optimization.stage={zero['stage']} contradicts "
            f"deepspeed.zero_stage={spec.zero_stage}: set deepspeed.zero_stage alone."
        )


def deepspeed_config(spec: TrainSpec, num_workers: int, accumulation: int) -> dict[str, Any]:
    """Build DeepSpeed's config with every batch number resolved.

    Raises:
        UserError: if `deepspeed.extra` holds what it must not.
    """
    check_extra(spec.deepspeed)
    config: dict[str, Any] = {
        # One "sample" is one micro-batch: its number of documents changes from batch to batch, and
        # the loss is weighted by documents before DeepSpeed sees it.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": num_workers * accumulation,
        "gradient_clipping": spec.train.max_grad_norm,
        "zero_optimization": _zero(spec.deepspeed.zero_stage),
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,  # the pipeline prints its own progress
        "wall_clock_breakdown": False,
    }
    if spec.train.precision == "bf16":
        config["bf16"] = {"enabled": True}
        if spec.deepspeed.zero_stage > 0:  # stage 0 refuses to mix the two
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return merged(config, spec.deepspeed.extra)


def _zero(stage: int) -> dict[str, Any]:
    if stage < 3:
        return {"stage": stage}
    return {
        "stage": 3,
        # Elements. DeepSpeed's own are for models of many billions (5e8 and 1e9): up to 500 million
        # parameters, each worker would hold all weights and all gradients whole at once.
        "reduce_bucket_size": 50_000_000,
        "sub_group_size": 50_000_000,
        "stage3_prefetch_bucket_size": 12_500_000,
        "stage3_max_live_parameters": 50_000_000,
        "stage3_max_reuse_distance": 50_000_000,
        "stage3_param_persistence_threshold": 10_000,  # smaller ones stay whole on every worker
    }


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested tables; `over` wins."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result
