"""What the train stage does: the model, its objective, the optimisation, DeepSpeed."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.specs.base import NotIdentity, Spec
from pipeline.specs.cluster import ClusterSpec


class ModelSpec(Spec):
    """The model: a size from scratch, or a pretrained backbone; and its latents."""

    size: str | None = None
    family: str = "gpt2"  # from scratch: which kind of backbone has that size
    # A folder or hub id of a pretrained decoder; its content is an input with a fingerprint.
    backbone: Annotated[str | None, NotIdentity] = None
    # Run Python code that lies beside the backbone's weights.
    trust_remote_code: Annotated[bool, NotIdentity] = False
    context: int = Field(512, gt=2)  # longest document in tokens; from scratch only
    dropout: float = Field(0.1, ge=0, lt=1)
    latents: Literal["layerwise", "single", "independent", "constant", "none"] = "layerwise"
    latent_size: int = Field(8, gt=0)
    latent_layers: tuple[int, int] | None = None  # first and last, both included; None: all
    encoder: Literal["shared", "separate"] = "shared"  # the encoder's weights
    fusion: Literal["low_rank", "paper", "add", "embed", "memory", "softmax", "embed+memory"] = (
        "low_rank"
    )
    fusion_rank: int = Field(4, gt=0)
    fusion_residual: bool = True
    pooling: Literal["mean", "attention", "first_token"] = "attention"
    # How attention is computed. auto: the backbone's own choice, scaled dot products as a rule.
    attention: Annotated[Literal["auto", "sdpa", "eager", "flash_attention_2"], NotIdentity] = (
        "auto"
    )

    @model_validator(mode="after")
    def _size_or_backbone(self) -> Self:
        if (self.size is None) == (self.backbone is None):
            raise ValueError(
                "give either model.size (from scratch) or model.backbone (pretrained), "
                f"not {'both' if self.size else 'neither'}"
            )
        return self


class BetaSpec(Spec):
    """Weight of the KL in the loss, as a pure function of the optimizer step.

    Lengths are shares of the run's steps: a schedule keeps its shape when a run gets longer.

    All are 0 for `delay` (an autoencoder start: the decoder learns to use the latents before they
    cost anything). Then:

    - constant: `value`.
    - linear: a ramp of `warmup` up to `value`.
    - logistic: the same ramp along a logistic curve, slow at both ends.
    - cyclical: cycles of `period`; each is 0 for its first `low` (a share of the cycle), then a
      ramp of `ramp`, then `value`.
    """

    kind: Literal["constant", "linear", "cyclical", "logistic"] = "constant"
    value: float = Field(1.0, ge=0)
    delay: float = Field(0.0, ge=0, le=1)
    warmup: float = Field(0.4, ge=0, le=1)
    period: float = Field(0.1, gt=0, le=1)
    low: float = Field(0.5, ge=0, le=1)
    ramp: float = Field(0.25, ge=0, le=1)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.kind in ("linear", "logistic") and self.delay + self.warmup > 1:
            raise ValueError(
                f"beta.delay + beta.warmup are shares of the run, but add up to "
                f"{self.delay + self.warmup:g}: beta would never reach its value; keep them to 1"
            )
        if self.kind == "cyclical" and self.low + self.ramp > 1:
            raise ValueError(
                f"beta.low + beta.ramp are shares of a cycle, but add up to "
                f"{self.low + self.ramp:g}: beta would never reach its value; keep them to 1"
            )
        return self


class LoraSpec(Spec):
    """Low-rank updates of the backbone's matrices: W + alpha / rank · B A."""

    rank: int = Field(8, gt=0)
    alpha: int = Field(16, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    # Names of the matrices; None: the attention's that peft chooses for the family.
    targets: list[str] | None = None


class OptimizationSpec(Spec):
    """The optimisation of one run. Steps are optimizer steps; tokens include padding."""

    seed: int = Field(0, ge=0)
    max_steps: int | None = Field(None, gt=0)
    max_epochs: int | None = Field(None, gt=0)
    # Token budget of one optimizer step over all workers, and of one forward on one worker.
    batch_tokens: int = Field(8192, gt=0)
    micro_batch_tokens: int = Field(8192, gt=0)
    # Tokens within which documents are shuffled and bucketed by length: bounds memory.
    shuffle_window_tokens: int = Field(16_000_000, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(100, ge=0)
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    min_learning_rate_ratio: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.98, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    # Make a layer's activations again in the backward pass: less memory for a third more work.
    activation_checkpointing: Annotated[bool, NotIdentity] = False
    # torch.compile of the model's blocks: the first steps take longer, the others less long.
    compile: Annotated[bool, NotIdentity] = False
    # all: every weight. latents: the parts that the latents have; the backbone stays as it is.
    # lora: these, and low-rank updates of the backbone.
    trainable: Literal["all", "latents", "lora"] = "all"
    lora: LoraSpec = LoraSpec()
    beta: BetaSpec = BetaSpec()
    # Nats of KL that cost nothing, of each document: of every layer, every dimension, or the sum;
    # or of its average over the documents of a global batch. Why these: docs/model.md.
    free_bits: float = Field(5.0, ge=0)
    free_bits_per: Literal["batch", "document", "layer", "dimension"] = "document"
    # The latents whose KL the loss charges, counted from 0, or from the last by −1; None: all.
    kl_layers: tuple[int, ...] | None = None
    bag_of_words: float = Field(0.0, ge=0)  # weight of predicting a document's tokens from z alone
    word_dropout: float = Field(0.0, ge=0, lt=1)  # share of the decoder's inputs that are hidden
    checkpoint_every: int = Field(500, gt=0)
    eval_every: int = Field(500, gt=0)
    eval_documents: int = Field(2000, gt=0)  # of the validation split, the same ones every time
    log_every: Annotated[int, NotIdentity] = Field(10, gt=0)
    keep_checkpoints: Annotated[int, NotIdentity] = Field(2, gt=0)
    # A number, or the least and the most: then as many as the cluster has room for, up and down.
    num_workers: int | tuple[int, int] = 1
    # Seconds between two looks at whether the cluster has room for more workers, or fewer.
    resize_every_s: Annotated[float, NotIdentity] = Field(30.0, gt=0)
    cpus_per_worker: Annotated[int, NotIdentity] = Field(1, gt=0)
    use_gpu: Annotated[bool | Literal["auto"], NotIdentity] = "auto"
    # How often the workers are started again after a fault, and after a preemption; -1: always.
    max_failures: Annotated[int, NotIdentity] = Field(3, ge=-1)
    max_preemptions: Annotated[int, NotIdentity] = Field(-1, ge=-1)
    # Seconds that a checkpoint may take once workers or driver were told that they must go.
    grace_s: Annotated[float, NotIdentity] = Field(30.0, gt=0)
    # Seconds without a step after which a worker hangs, and is started again; none: never.
    step_timeout_s: Annotated[float | None, NotIdentity] = Field(1800.0, gt=0)
    # Go on from checkpoints that another version of the code or of its libraries wrote.
    accept_other_versions: Annotated[bool, NotIdentity] = False
    # Updates in a row that may be left out, because their gradient is not finite.
    max_skipped_steps: Annotated[int, NotIdentity] = Field(10, ge=0)

    @property
    def min_workers(self) -> int:
        """The fewest workers that a run goes with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that a run takes."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers follows the cluster."""
        return not isinstance(self.num_workers, int)

    @model_validator(mode="after")
    def _workers(self) -> Self:
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(
                f"train.num_workers={self.num_workers} is refused: expected a number from 1 on, or "
                "the least and the most, as in [1,4]"
            )
        return self

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.max_steps is None and self.max_epochs is None:
            raise ValueError("give train.max_steps or train.max_epochs: without one it never ends")
        return self


class DeepSpeedSpec(Spec):
    """How DeepSpeed shards training state, and what else its own config is to hold."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    # Merged over the config that the pipeline builds; keys are DeepSpeed's own.
    extra: dict[str, Any] = Field(default_factory=dict)


class TrainSpec(Spec):
    """One run of the train stage. Its input is a dataset artifact."""

    model: ModelSpec
    train: OptimizationSpec
    deepspeed: DeepSpeedSpec = DeepSpeedSpec()
    cluster: Annotated[ClusterSpec, NotIdentity] = ClusterSpec()
