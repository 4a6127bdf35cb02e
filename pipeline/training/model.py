"""The model and schedules that a spec asks for; used by the driver's checks and by the workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.cluster import scratch_folder
from pipeline.errors import UserError
from pipeline.specs import TrainSpec
from pipeline.storage import Location, local_copy

if TYPE_CHECKING:
    from della_model import BetaSchedule, Della, DellaConfig, LearningRateSchedule
    from pipeline.batches import BatchOrder
    from pipeline.shards import Dataset


@dataclass(frozen=True)
class Vocabulary:
    """What the model must know of the dataset's tokenizer."""

    size: int
    bos_id: int
    eos_id: int
    pad_id: int

    @classmethod
    def of(cls, dataset: Dataset) -> Vocabulary:
        """Read the dataset's tokenizer."""
        from pipeline.tokenization import load_tokenizer, special_ids, vocabulary_size

        tokenizer = load_tokenizer(dataset.tokenizer_folder)
        special = special_ids(tokenizer)
        return cls(vocabulary_size(tokenizer), special.bos, special.eos, special.pad)


def backbone_folder(name: str) -> str:
    """What transformers loads for `model.backbone`: a local folder, or the hub id itself."""
    location = Location.parse(name)
    if location.is_local and not location.exists():
        return name
    return str(local_copy(location, scratch_folder()))


def della_config(spec: TrainSpec, vocabulary: Vocabulary) -> DellaConfig:
    """The model's configuration; no weights are made or read.

    Raises:
        UserError: if a name or number of `model.*` is refused, a pretrained backbone cannot be
            read, or the tokenizer has ids that it has no embedding for.
    """
    from della_model import ConfigError, DellaConfig, gpt2_config

    model = spec.model
    try:
        if model.size is not None:
            backbone: Any = gpt2_config(
                model.size,
                vocabulary.size,
                n_positions=model.context,
                dropout=model.dropout,
                bos_token_id=vocabulary.bos_id,
                eos_token_id=vocabulary.eos_id,
                pad_token_id=vocabulary.pad_id,
            )
        else:
            backbone = _pretrained_config(str(model.backbone), vocabulary)
        return DellaConfig(backbone=backbone, **_latent_options(spec))
    except ConfigError as error:
        raise UserError(f"model.{error}") from None


def build_model(spec: TrainSpec, vocabulary: Vocabulary) -> Della:
    """Build the model, the same on every worker; a pretrained backbone starts from its weights.

    Raises:
        UserError: as `della_config` does, and where the backbone's weights cannot be read.
    """
    import torch

    from della_model import ConfigError, Della

    config = della_config(spec, vocabulary)
    torch.manual_seed(spec.train.seed)
    if spec.model.backbone is None:
        return Della(config)
    try:
        model = Della.from_backbone(
            backbone_folder(spec.model.backbone), dtype=torch.float32, **_latent_options(spec)
        )
    except (ConfigError, OSError, ValueError) as error:
        raise _unreadable(spec.model.backbone, error) from None
    set_dropout(model, spec.model.dropout)
    return model


def set_dropout(model: Della, probability: float) -> None:
    """Set every dropout of a model: a pretrained backbone brings its own."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
    backbone = model.config.backbone
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop", "attention_dropout"):
        if hasattr(backbone, name):
            setattr(backbone, name, probability)


def beta_schedule(spec: TrainSpec, total_steps: int) -> BetaSchedule:
    """Weight of the KL by optimizer step, of a run of `total_steps`."""
    from della_model import BetaSchedule

    beta = spec.train.beta
    if beta.kind == "constant":
        return BetaSchedule("constant", beta.value)
    return BetaSchedule(
        kind=beta.kind,
        value=beta.value,
        delay_steps=round(beta.delay * total_steps),
        warmup_steps=round(beta.warmup * total_steps),
        period_steps=max(round(beta.period * total_steps), 1),
        low_fraction=beta.low,
        ramp_fraction=beta.ramp,
    )


def learning_rate_schedule(spec: TrainSpec, total_steps: int) -> LearningRateSchedule:
    """Learning rate by optimizer step. A warm-up longer than the run just does not end in it."""
    from della_model import LearningRateSchedule

    train = spec.train
    return LearningRateSchedule(
        peak=train.learning_rate,
        warmup_steps=train.warmup_steps,
        total_steps=max(total_steps, train.warmup_steps),
        decay=train.decay,
        floor=train.learning_rate * train.min_learning_rate_ratio,
    )


def count_steps(spec: TrainSpec, order: BatchOrder) -> int:
    """Optimizer steps of the whole run: `max_steps` or `max_epochs`, whichever ends first."""
    train = spec.train
    steps, epoch = 0, 0
    while train.max_epochs is not None and epoch < train.max_epochs:
        if train.max_steps is not None and steps >= train.max_steps:
            break
        steps += order.num_batches(epoch)
        epoch += 1
    if train.max_epochs is None:
        return train.max_steps or 0
    return steps if train.max_steps is None else min(steps, train.max_steps)


def _latent_options(spec: TrainSpec) -> dict[str, Any]:
    model = spec.model
    return {
        "latents": model.latents,
        "latent_size": model.latent_size,
        "latent_layers": None if model.latent_layers is None else list(model.latent_layers),
        "encoder": model.encoder,
        "fusion": model.fusion,
        "fusion_rank": model.fusion_rank,
        "fusion_residual": model.fusion_residual,
        "pooling": model.pooling,
    }


def _pretrained_config(name: str, vocabulary: Vocabulary) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(backbone_folder(name))
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from None
    if vocabulary.size > config.vocab_size:
        raise UserError(
            f"the dataset's tokenizer has {vocabulary.size:,} ids, but model.backbone={name} has "
            f"embeddings for {config.vocab_size:,}: ids beyond them have none; preprocess the "
            "texts with the backbone's own tokenizer (tokenizer=hf tokenizer.path=...)."
        )
    return config


def _unreadable(name: str, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"model.backbone={name} cannot be read ({reason}): expected a folder with config.json and "
        "weights, or a hub id that this machine can reach; check the path."
    )
