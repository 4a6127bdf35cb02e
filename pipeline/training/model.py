"""The model and schedules that a spec asks for; used by the driver's checks and by the workers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cluster import scratch_folder
from pipeline.errors import UserError, first_line
from pipeline.specs import TrainSpec
from pipeline.storage import Location, local_copy

if TYPE_CHECKING:
    from della_model import BetaSchedule, Della, DellaConfig, LearningRateSchedule, Objective
    from pipeline.batches import BatchOrder
    from pipeline.shards import Dataset


# What families call a probability of dropout, in a module or in a configuration. What is dropped
# between two layers of a feed-forward network (BART's activation_dropout) stays as it is.
_DROPOUTS = (
    "dropout", "attention_dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop", "dropout_rate",
)  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """What the model must know of the dataset's tokenizer."""

    size: int
    ordinary_size: int  # without the special tokens behind all others
    bos_id: int
    eos_id: int
    pad_id: int

    @classmethod
    def of(cls, dataset: Dataset) -> Vocabulary:
        """Read the dataset's tokenizer."""
        from pipeline.tokenization import (
            load_tokenizer,
            ordinary_size,
            special_ids,
            vocabulary_size,
        )

        tokenizer = load_tokenizer(dataset.tokenizer_folder)
        special = special_ids(tokenizer)
        sizes = vocabulary_size(tokenizer), ordinary_size(tokenizer)
        return cls(*sizes, special.bos, special.eos, special.pad)


def backbone_folder(name: str) -> str:
    """What transformers loads for `model.backbone`: a local folder, or the hub id itself."""
    location = Location.parse(name)
    if location.is_local and not location.exists():
        return name
    return str(local_copy(location, scratch_folder()))


def della_config(spec: TrainSpec, vocabulary: Vocabulary, conditional: bool = False) -> DellaConfig:
    """The model's configuration; no weights are made or read.

    Args:
        spec: what was asked for.
        vocabulary: the dataset's.
        conditional: whether the dataset's documents have sources.

    Raises:
        UserError: if a name or number of `model.*` is refused, a pretrained backbone cannot be
            read, or the tokenizer has ids that it has no embedding for.
    """
    from della_model import ConfigError, DellaConfig, backbone_config

    model = spec.model
    try:
        if model.size is not None:
            backbone: Any = backbone_config(
                model.family,
                model.size,
                vocabulary.size,
                n_positions=model.context,
                dropout=model.dropout,
                bos_token_id=vocabulary.bos_id,
                eos_token_id=vocabulary.eos_id,
                pad_token_id=vocabulary.pad_id,
            )
        else:
            backbone = _pretrained_config(str(model.backbone), vocabulary, model.trust_remote_code)
        if model.attention != "auto":
            backbone._attn_implementation = model.attention
        return DellaConfig(backbone=backbone, **_latent_options(spec, conditional))
    except ConfigError as error:
        raise UserError(f"model.{error}") from None


def build_model(
    spec: TrainSpec,
    vocabulary: Vocabulary,
    conditional: bool = False,
    deepspeed_config: dict[str, Any] | None = None,
) -> Della:
    """Build the model, the same on every worker; a pretrained backbone starts from its weights.

    With DeepSpeed's config of ZeRO stage 3 a pretrained backbone is sharded while it is read.

    Raises:
        UserError: as `della_config` does, and where the backbone's weights cannot be read.
    """
    import torch

    from della_model import ConfigError, Della
    from pipeline.training.sharded import load_sharded, start_part

    config = della_config(spec, vocabulary, conditional)
    torch.manual_seed(spec.train.seed)
    if spec.model.backbone is None:
        scratch = Della(config)
        prepare_blocks(scratch, spec)
        return scratch
    folder = backbone_folder(spec.model.backbone)
    try:
        model: Della | None = None
        if spec.deepspeed.zero_stage == 3 and deepspeed_config is not None:
            model = load_sharded(config, Path(folder), spec.train.seed, deepspeed_config)
        if model is None:  # built whole; DeepSpeed shards it later, if it is to
            options = _latent_options(spec, conditional)
            options["trust_remote_code"] = spec.model.trust_remote_code
            if spec.model.attention != "auto":
                options["attn_implementation"] = spec.model.attention
            model = Della.from_backbone(folder, dtype=torch.float32, **options)
            if config.backbone.vocab_size > model.config.backbone.vocab_size:
                torch.manual_seed(spec.train.seed)
                model.resize_token_embeddings(config.backbone.vocab_size)
            for name, part in model.latent_parts():
                start_part(name, part, spec.train.seed)
        for told in (model.config.backbone, model.generation_config):
            told.bos_token_id, told.eos_token_id = vocabulary.bos_id, vocabulary.eos_id
        model.generation_config.pad_token_id = vocabulary.pad_id
    except (ConfigError, OSError, ValueError) as error:
        raise _unreadable(spec.model.backbone, error) from None
    set_dropout(model, spec.model.dropout)
    prepare_blocks(model, spec)
    return model


def prepare_blocks(model: Della, spec: TrainSpec) -> None:
    """Switch activation checkpointing and compilation on, where the spec asks for them."""
    if spec.train.activation_checkpointing:
        # The reentrant kind would run the hooks of ZeRO's gradients twice for shared weights.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if spec.train.compile:
        for block in model.blocks():
            block.compile(dynamic=True)


def check_attention(name: str) -> None:
    """Check that this machine can compute attention in the way asked for.

    Raises:
        UserError: if it cannot.
    """
    import torch
    from transformers.utils import is_flash_attn_2_available

    if name != "flash_attention_2":
        return
    if not torch.cuda.is_available() or not is_flash_attn_2_available():
        lacks = "the package flash-attn" if torch.cuda.is_available() else "a CUDA GPU"
        raise UserError(
            f"model.attention=flash_attention_2 needs a CUDA GPU and the package flash-attn on "
            f"every worker, but this one lacks {lacks}; set model.attention=sdpa, which picks a "
            "fused kernel itself."
        )


def set_dropout(model: Della, probability: float) -> None:
    """Set every dropout of a model: a pretrained backbone brings its own.

    Whole layers are never dropped: the workers would drop different ones.
    """
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name in _DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)
        if hasattr(module, "layerdrop"):
            module.layerdrop = 0.0
    backbone = model.config.backbone
    for name in _DROPOUTS:
        if hasattr(backbone, name):
            setattr(backbone, name, probability)


def build_objective(spec: TrainSpec, model: Della) -> Objective:
    """What the spec minimises.

    Raises:
        UserError: if its terms do not fit the model.
    """
    from della_model import ConfigError, Objective

    train = spec.train
    try:
        return Objective(
            model,
            free_bits=train.free_bits,
            free_bits_per=train.free_bits_per,
            kl_layers=train.kl_layers,
            bag_of_words=train.bag_of_words,
        )
    except ConfigError as error:
        raise UserError(f"train.{error}") from None


def check_objective(spec: TrainSpec, config: DellaConfig) -> None:
    """Check that the loss's terms fit the model, without making its weights.

    Raises:
        UserError: as `build_objective` does.
    """
    import torch

    from della_model import Della

    with torch.device("meta"):
        build_objective(spec, Della(config))


def beta_schedule(spec: TrainSpec, total_steps: int) -> BetaSchedule:
    """Weight of the KL by optimizer step, of a run of `total_steps`."""
    from della_model import BetaSchedule

    beta = spec.train.beta
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


def _latent_options(spec: TrainSpec, conditional: bool) -> dict[str, Any]:
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
        "conditional": conditional,
    }


def _pretrained_config(name: str, vocabulary: Vocabulary, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            backbone_folder(name), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from None
    if vocabulary.ordinary_size > config.vocab_size:
        raise UserError(
            f"the dataset's tokenizer has {vocabulary.size:,} ids, but model.backbone={name} has "
            f"embeddings for {config.vocab_size:,}: ids beyond them have none; preprocess the "
            "texts with the backbone's own tokenizer (tokenizer=hf tokenizer.path=...)."
        )
    # Special tokens that were added to the backbone's own get embeddings of their own.
    config.vocab_size = max(config.vocab_size, vocabulary.size)
    config.bos_token_id = vocabulary.bos_id
    config.eos_token_id = vocabulary.eos_id
    return config


def check_backbone_tokenizer(spec: TrainSpec, dataset: Dataset) -> None:
    """Check that token ids mean to the dataset what they mean to a pretrained backbone.

    What the backbone's ids mean is known where its tokenizer lies beside its weights.

    Raises:
        UserError: naming the first id that means something else.
    """
    from pipeline.tokenization import backend_of, load_tokenizer

    if spec.model.backbone is None:
        return
    folder = Path(backbone_folder(spec.model.backbone))
    if not (folder / "tokenizer.json").is_file():
        return
    tokenizers = load_tokenizer(dataset.tokenizer_folder), load_tokenizer(folder)
    ours, theirs = (
        {i: token for token, i in backend_of(t).get_vocab(with_added_tokens=True).items()}
        for t in tokenizers
    )
    wrong = sorted(i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i])
    if wrong:
        i = wrong[0]
        raise UserError(
            f"the dataset's tokenizer is not the one of model.backbone={spec.model.backbone}: "
            f"{len(wrong):,} ids mean something else (id {i} is {ours[i]!r} in the dataset and "
            f"{theirs[i]!r} to the backbone), so it would read other words; preprocess the texts "
            f"with tokenizer=hf tokenizer.path={spec.model.backbone}."
        )


def _unreadable(name: str, error: Exception) -> UserError:
    reason = first_line(error)
    return UserError(
        f"model.backbone={name} cannot be read ({reason}): expected a folder with config.json and "
        "weights, or a hub id that this machine can reach; check the path."
    )
