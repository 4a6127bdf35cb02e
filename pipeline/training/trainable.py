"""Which parameters a run trains: all, those of the latents alone, or low-rank updates too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from pipeline.errors import UserError, nearest
from pipeline.specs import OptimizationSpec

if TYPE_CHECKING:
    from della_model import Della

_ADAPTER = "default"  # peft's name for the only one
_WRAPPED = ".projection"  # what a fused projection calls the backbone's own


def set_trainable(model: Della, spec: OptimizationSpec) -> None:
    """Freeze what `train.trainable` leaves out; with `lora`, put low-rank updates in.

    Raises:
        UserError: if `train.lora.targets` names no matrix of the backbone.
    """
    if spec.trainable == "all":
        return
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _, part in model.latent_parts():
        part.requires_grad_(True)
    if spec.trainable == "lora":
        _add_low_rank_updates(model, spec)


def _add_low_rank_updates(model: Della, spec: OptimizationSpec) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    lora = spec.lora
    wanted = lora.targets or default_targets(model)
    matrices = _matrices(model.backbone)
    names = [n for n in matrices if _own_name(n).rsplit(".", 1)[-1] in wanted]
    if not names:
        known = sorted({_own_name(name).rsplit(".", 1)[-1] for name in matrices})
        raise UserError(
            f"train.lora.targets={','.join(wanted)} names no matrix of this backbone"
            f"{nearest(wanted[0], known)}: nothing of it would be trained; it has "
            f"{', '.join(known)}."
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=names,
        fan_in_fan_out=_is_transposed(model),
    )
    inject_adapter_in_model(config, model.backbone, _ADAPTER)
    for _, part in model.latent_parts():  # peft freezes all that is not its own
        part.requires_grad_(True)


def default_targets(model: Della) -> list[str]:
    """The attention's projections that peft adapts in a family when it is not told."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    return list(TARGETS[model.config.backbone.model_type])


def _matrices(backbone: nn.Module) -> list[str]:
    """The backbone's linear maps, by name; no fusion's, and not the vocabulary head."""
    from transformers.pytorch_utils import Conv1D

    head = backbone.get_output_embeddings()  # type: ignore[operator]
    return [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and ".fusion." not in name
    ]


def _is_transposed(model: Della) -> bool:
    """Whether the backbone keeps its matrices as [in, out], as GPT-2's Conv1D does."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.backbone.modules())


def _own_name(name: str) -> str:
    """What the backbone itself calls a matrix that may lie in a fused projection."""
    return name.removesuffix(_WRAPPED)


@dataclass(frozen=True)
class LowRankUpdate:
    """One adapted matrix: W + scaling · B A."""

    name: str  # of the matrix, as the backbone calls it
    weight: nn.Parameter
    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    transposed: bool  # whether W is kept as [in, out]

    def merged(self, weight: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        """The whole matrix from the gathered parts."""
        assert a is not None
        assert b is not None
        update = self.scaling * (b @ a)
        return weight + (update.T if self.transposed else update)


def low_rank_updates(model: nn.Module) -> list[LowRankUpdate]:
    """All adapted matrices of a model; [] where there are none."""
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError:
        return []
    return [
        LowRankUpdate(
            _own_name(name),
            cast(nn.Parameter, module.get_base_layer().weight),
            cast(nn.Parameter, module.lora_A[_ADAPTER].weight),
            cast(nn.Parameter, module.lora_B[_ADAPTER].weight),
            module.scaling[_ADAPTER],
            getattr(module, "fan_in_fan_out", False),
        )
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]


def adapter_config(model: Della, spec: OptimizationSpec, base: str | None) -> dict[str, Any]:
    """The `adapter_config.json` with which peft puts the updates on the plain backbone."""
    from peft import LoraConfig, TaskType

    names = {update.name.rsplit(".", 1)[-1] for update in low_rank_updates(model)}
    is_pair = model.config.adapter.is_encoder_decoder
    config = LoraConfig(
        r=spec.lora.rank,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout,
        target_modules=sorted(names),
        fan_in_fan_out=_is_transposed(model),
        base_model_name_or_path=base,
        task_type=TaskType.SEQ_2_SEQ_LM if is_pair else TaskType.CAUSAL_LM,
        inference_mode=True,
    )
    values: dict[str, Any] = config.to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}
