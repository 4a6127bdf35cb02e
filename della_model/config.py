"""The configuration of a Della: its backbone's, and how latents enter it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import AutoConfig, GPT2Config, PreTrainedConfig

from della_model.backbones import BACKBONES, BackboneAdapter
from della_model.errors import ConfigError, unknown_name
from della_model.fusion import FUSIONS, REPLACING_FUSIONS
from della_model.pooling import POOLINGS

LATENTS = ("layerwise", "single", "independent", "constant", "none")
ENCODERS = ("shared", "separate")


class DellaConfig(PreTrainedConfig):
    """What `Della` is built from; saved beside the weights in one `config.json`.

    Args:
        backbone: configuration of the decoder (also of the encoder, which has its shape), as an
            object or a dictionary with `model_type`. Default: GPT-2's published base size.
        latents: "layerwise", a latent in every layer that depends on those below (DELLA);
            "independent", one in every layer that does not; "single", one for all layers;
            "constant", a learnt one in every layer, the same for all documents: a plain language
            model with the decoder of a DELLA; "none", a plain language model.
        latent_size: p, the size of each latent.
        latent_layers: first and last decoder layer with a latent, counted from 0, both included;
            None for all.
        encoder: "shared", the decoder's own weights without latents; "separate", weights of its
            own, which start as a pretrained backbone's where there is one.
        fusion: how latents enter the decoder, a name in `fusion.FUSIONS`.
        fusion_rank: R of the low-rank fusion.
        fusion_residual: True adds a product to the values, starting as the identity; False
            replaces them, as in the paper.
        conditional: whether every document is generated from a source: latents then depend on it,
            a decoder-only backbone has it before the document, and an encoder–decoder one looks at
            it through its cross-attention.
        pooling: how an encoder layer's hidden states become one vector, a name in
            `pooling.POOLINGS`.

    Raises ConfigError where a field cannot be used.
    """

    model_type = "della"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    backbone: Any = None
    latents: Any = "layerwise"
    latent_size: Any = 32
    latent_layers: Any = None
    encoder: Any = "shared"
    fusion: Any = "low_rank"
    fusion_rank: Any = 4
    fusion_residual: Any = True
    conditional: Any = False
    pooling: Any = "attention"

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbone = _backbone_config(self.backbone)
        if isinstance(self.latent_layers, Sequence) and not isinstance(self.latent_layers, str):
            self.latent_layers = list(self.latent_layers)  # what a saved file gives back
        self.check()
        # transformers writes this one's attention implementation, None if absent, into the
        # backbone's: it must not undo what a loaded backbone has settled on.
        kwargs.setdefault("attn_implementation", self.backbone._attn_implementation)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', but refuses the configuration of another kind of model."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ConfigError(
                f"config.json: expected model_type 'della', got {model_type!r}: this is a plain "
                "backbone, without latents; build on it with Della.from_backbone(...)."
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def adapter(self) -> BackboneAdapter:
        """What is particular to the backbone's family."""
        return BACKBONES[self.backbone.model_type]

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return self.adapter.num_layers(self.backbone)

    @property
    def context(self) -> int:
        """The longest sequence that the backbone takes, in tokens."""
        return self.adapter.context(self.backbone)

    @property
    def num_latent_layers(self) -> int:
        """L, the number of latents of a document."""
        return len(self.feature_layers)

    @property
    def latent_layer_indices(self) -> range:
        """The decoder layers that a latent enters, counted from 0."""
        if self.latents == "none":
            return range(0)
        first, last = self.latent_layers or (0, self.num_layers - 1)
        return range(first, last + 1)

    @property
    def feature_layers(self) -> range:
        """The encoder layers that posteriors are inferred from, one for each latent."""
        if self.latents == "constant":
            return range(0)
        layers = self.latent_layer_indices
        return layers[-1:] if self.latents == "single" else layers

    @property
    def num_decoder_latents(self) -> int:
        """What enters the decoder: a document's L latents, or as many constants."""
        constants = len(self.latent_layer_indices) if self.latents == "constant" else 0
        return constants or self.num_latent_layers

    def latent_of_layer(self, layer: int) -> int | None:
        """Which of a document's latents enters a decoder layer; None where none does."""
        if layer not in self.latent_layer_indices:
            return None
        return 0 if self.latents == "single" else layer - self.latent_layer_indices.start

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:  # noqa: ARG002
        """The backbone's: generation sizes its cache and finds its token ids there."""
        return self.backbone

    def check(self) -> None:
        """Raises ConfigError at the first field that cannot be used."""
        _check_whole("latent_size", self.latent_size, "a latent needs a dimension; 32 is usual")
        _check_whole("fusion_rank", self.fusion_rank, "without a rank nothing is fused; 4 is usual")
        for name, known in _NAMES.items():
            if getattr(self, name) not in known:
                raise ConfigError(unknown_name(name, getattr(self, name), known))
        self._check_fusion_residual()
        self._check_conditional()
        self._check_latent_layers()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            self._check_token(name, getattr(self.backbone, name, None))

    def _check_fusion_residual(self) -> None:
        if not isinstance(self.fusion_residual, bool):
            raise ConfigError(
                f"fusion_residual: expected true or false, got {self.fusion_residual!r}."
            )
        if not self.fusion_residual and self.fusion not in REPLACING_FUSIONS:
            raise ConfigError(
                f"fusion_residual: expected true for fusion {self.fusion!r}, got false: only a "
                f"product with the values can replace them; choose the fusion "
                f"{' or '.join(REPLACING_FUSIONS)}, or leave fusion_residual out."
            )

    def _check_conditional(self) -> None:
        if not isinstance(self.conditional, bool):
            raise ConfigError(f"conditional: expected true or false, got {self.conditional!r}.")
        if self.encoder == "separate" and self.adapter.is_encoder_decoder:
            raise ConfigError(
                f"encoder: expected shared for a backbone of type {self.backbone.model_type!r}, "
                "got separate: it has an encoder of its own already; leave encoder out."
            )

    def _check_latent_layers(self) -> None:
        layers, count = self.latent_layers, self.num_layers
        if layers is None:
            return
        expected = (
            f"latent_layers: expected [first, last] with 0 ≤ first ≤ last ≤ {count - 1}, both "
            f"included, or null for all, got {layers!r}: "
        )
        remedy = f"; this backbone has layers 0 to {count - 1}."
        if not isinstance(layers, list) or len(layers) != 2 or not all(map(_is_whole, layers)):
            raise ConfigError(expected + "a range of layers is two whole numbers" + remedy)
        first, last = layers
        if not 0 <= first <= last < count:
            raise ConfigError(expected + "the range is empty or leaves the backbone" + remedy)

    def _check_token(self, name: str, token: Any) -> None:
        ids = token if isinstance(token, list) else [token]
        for one in ids:
            if one is not None and not 0 <= one < self.backbone.vocab_size:
                raise ConfigError(
                    f"backbone.{name}: expected an id below the vocabulary's size "
                    f"{self.backbone.vocab_size}, got {one}: it would have no embedding; give the "
                    "tokenizer's own id."
                )


_NAMES = {"latents": LATENTS, "encoder": ENCODERS, "fusion": FUSIONS, "pooling": POOLINGS}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_whole(name: str, value: Any, why: str) -> None:
    if not _is_whole(value) or value < 1:
        raise ConfigError(f"{name}: expected a whole number ≥ 1, got {value!r}: {why}.")


def _backbone_config(given: Any) -> PreTrainedConfig:
    """The backbone's configuration as an object, and a supported one."""
    if given is None:
        return GPT2Config()
    if isinstance(given, dict):
        fields = copy.deepcopy(given)
        model_type = fields.pop("model_type", None)
        check_supported(model_type)
        return AutoConfig.for_model(model_type, **fields)
    check_supported(getattr(given, "model_type", given))
    return given


def check_supported(model_type: Any) -> None:
    """Raises ConfigError where there is no adapter for a family of backbones."""
    if model_type not in BACKBONES:
        raise ConfigError(
            unknown_name(
                "backbone.model_type",
                model_type,
                BACKBONES,
                "Each family needs an adapter in della_model.backbones: where latents enter.",
            )
        )


AutoConfig.register(DellaConfig.model_type, DellaConfig, exist_ok=True)
