"""Della: a Transformer decoder with a latent in every layer (Hu et al. 2022, arXiv 2207.06130)."""

from __future__ import annotations

import copy
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)

from della_model.backbones import BACKBONES
from della_model.backbones.base import encode
from della_model.config import DellaConfig, check_supported
from della_model.errors import InputError
from della_model.fusion import FUSIONS, Fusion, LatentMemory, Shift
from della_model.gaussian import at_least_float32
from della_model.head import VocabularyHead
from della_model.latents import LatentChain, LatentSample
from della_model.outputs import DellaOutput, ElboTerms
from della_model.pooling import Pooling
from della_model.routing import place_fusion, place_memory, route_latent
from della_model.shapes import Bool, Float, Int

# Options of `from_pretrained` that say which files are meant: the configuration's too.
_SOURCE_OPTIONS = {"revision", "subfolder", "cache_dir", "token", "local_files_only"}


class Della(PreTrainedModel, GenerationMixin):
    """Encoder and decoder are one backbone, run twice, or two of one shape.

    1. `features`: the encoder without latents, every position seeing every other; hidden states
       after each latent layer are pooled over unpadded positions to x_l.
    2. `infer`: the chain draws z_l ~ q(z_l | z_<l, x).
    3. `reconstruction_nll`: the backbone, causal, under the latents: layer l's attention values
       fused with z_l, or another of the ways in `fusion`.

    A document is BOS, its tokens, EOS; `attention_mask` is 1 on them and 0 on padding, which stands
    at the right or at the left and changes nothing. Token ids are never asked what padding is: in
    GPT-2, BOS, EOS and padding are one id.
    """

    config_class = DellaConfig
    base_model_prefix = "della"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _skip_keys_device_placement = ("past_key_values",)

    def __init__(
        self,
        config: DellaConfig,
        backbone: PreTrainedModel | None = None,
        encoder: PreTrainedModel | None = None,
    ) -> None:
        # transformers writes dtypes and attention implementations into a configuration; a second
        # model built from the caller's must not find them there.
        config = copy.deepcopy(config)
        super().__init__(config)
        adapter = BACKBONES[config.backbone.model_type]
        if backbone is None:
            backbone = adapter.build(config.backbone)
        else:
            config.backbone = backbone.config
            _keep_weights(backbone)
        self.backbone = backbone
        self._adapter = adapter
        if config.encoder == "separate" and config.num_latent_layers:
            if encoder is None:
                encoder = adapter.trunk(adapter.build(copy.deepcopy(config.backbone)))
            else:
                _keep_weights(encoder)
            self.encoder = encoder
        self._place_fusions()
        hidden_size = config.backbone.hidden_size
        self.pooling = nn.ModuleList(
            Pooling(hidden_size, config.pooling) for _ in config.feature_layers
        )
        self.chain = LatentChain(
            config.num_latent_layers,
            config.latent_size,
            hidden_size,
            linked=config.latents == "layerwise",
        )
        self.post_init()

    def _place_fusions(self) -> None:
        """Opens the decoder where the configuration's fusion lets latents in."""
        config, entry = self.config, FUSIONS[self.config.fusion]
        for layer, attention in enumerate(self._adapter.self_attentions(self.backbone)):
            slot = config.latent_of_layer(layer)
            if slot is not None and entry.values is not None:
                fusion = entry.values(
                    attention.value_size,
                    config.latent_size,
                    config.fusion_rank,
                    config.fusion_residual,
                )
                place_fusion(attention, fusion)
            if slot is not None and entry.memory:
                heads = attention.num_heads, attention.head_size
                place_memory(attention, LatentMemory(*heads, config.latent_size))
            route_latent(attention, slot)
        shape = config.num_latent_layers, config.latent_size, config.backbone.hidden_size
        has_latents = config.num_latent_layers > 0
        self.embedding_shift = Shift(*shape) if has_latents and entry.embeddings else None
        self.output_shift = Shift(*shape) if has_latents and entry.output else None

    @classmethod
    def from_backbone(cls, folder_or_hub_id: str | PathLike[str], **options: Any) -> Della:
        """A Della around a pretrained decoder; with `fusion_residual` it starts as that decoder.

        `options` that are fields of DellaConfig go there; the rest goes to transformers'
        `from_pretrained` of the backbone (dtype, revision, attn_implementation, …).
        """
        fields = set(DellaConfig.__annotations__) - {"backbone"}
        della_options = {name: options.pop(name) for name in fields & set(options)}
        where = {name: options[name] for name in _SOURCE_OPTIONS & set(options)}
        backbone_config = AutoConfig.from_pretrained(folder_or_hub_id, **where)
        check_supported(backbone_config.model_type)
        # Before the weights are read, so that a wrong option costs no wait.
        DellaConfig(backbone=backbone_config, **della_options)
        adapter = BACKBONES[backbone_config.model_type]
        backbone = adapter.load(folder_or_hub_id, **options)
        config = DellaConfig(backbone=backbone.config, **della_options)
        encoder = None
        if config.encoder == "separate":
            encoder = adapter.trunk(adapter.load(folder_or_hub_id, **options))
        model = cls(config, backbone=backbone, encoder=encoder)
        model.generation_config = copy.deepcopy(backbone.generation_config)
        model.config.dtype = backbone.dtype
        return model.to(backbone.dtype)

    # --- the three steps -------------------------------------------------------------------------

    def features(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
    ) -> Float[Tensor, "batch layers hidden"]:
        """x_l for each latent layer: pooled hidden states of the bidirectional pass."""
        self._check_length(input_ids)
        layers = self.config.feature_layers
        if not layers:
            size = self.config.backbone.hidden_size
            return self.head.weight.new_zeros(len(input_ids), 0, size)
        unpadded = attention_mask.bool()
        hidden = encode(self.encoder_trunk, input_ids, unpadded, _positions(unpadded), layers)
        pooled = [pool(h, unpadded) for pool, h in zip(self.pooling, hidden, strict=True)]
        return torch.stack(pooled, dim=1)

    def infer(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
        noise: Float[Tensor, "*draws batch layers latent"],
    ) -> LatentSample:
        """z_l ~ q(z_l | z_<l, x); noise ~ N(0, I), with leading dimensions for more draws."""
        self._check_latents("noise", noise, len(input_ids))
        return self.chain.infer(self.features(input_ids, attention_mask), noise)

    def reconstruction_nll(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
        latents: Float[Tensor, "batch layers latent"],
    ) -> Float[Tensor, " batch"]:
        """−log p(x | z) in nats, summed over predicted tokens: all but BOS and padding."""
        self._check_length(input_ids)
        self._check_latents("latents", latents, len(input_ids))
        # The last column is only ever predicted, whichever side the padding is on.
        unpadded = attention_mask.bool()
        inputs, known = input_ids[:, :-1], unpadded[:, :-1]
        if inputs.shape[1] == 0:
            return at_least_float32(latents).new_zeros(len(input_ids))
        hidden = self._decode(
            inputs,
            latents,
            attention_mask=known.long(),
            position_ids=_positions(known),
            use_cache=False,
        ).last_hidden_state
        return self._nll_of_hidden(hidden, input_ids, unpadded)

    def elbo_terms(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
        noise: Float[Tensor, "batch layers latent"],
    ) -> ElboTerms:
        """The terms of log p(x | z) − Σ_l KL(q_l ‖ p_l) under one draw z ~ q(z | x)."""
        sample = self.infer(input_ids, attention_mask, noise)
        nll = self.reconstruction_nll(input_ids, attention_mask, sample.latents)
        num_predicted = _predicted(attention_mask.bool()).sum(-1)
        return ElboTerms(nll, sample.kl_per_layer, num_predicted, sample)

    # --- transformers' interface -----------------------------------------------------------------

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Tensor | None = None,
        latents: Float[Tensor, "batch layers latent"] | None = None,
        noise: Float[Tensor, "batch layers latent"] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> DellaOutput:
        """The decoder under `latents`, or, without them, under latents inferred from the input.

        In the second case the terms of the ELBO come along. `attention_mask` covers cached
        positions too. `logits_to_keep`: the last n positions only, or those of an index; 0 for all.
        """
        if attention_mask is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            batch, time = input_ids.shape
            attention_mask = input_ids.new_ones(batch, past + time)
        sample = None
        if latents is None:
            self._check_no_cache(past_key_values)
            noise = self.draw_noise(len(input_ids)) if noise is None else noise
            sample = self.infer(input_ids, attention_mask, noise)
            latents = sample.latents
        self._check_latents("latents", latents, len(input_ids))
        if position_ids is None and attention_mask.ndim == 2:
            position_ids = _positions(attention_mask.bool())[:, -input_ids.shape[1] :]
        decoded = self._decode(
            input_ids,
            latents,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
            **kwargs,
        )
        hidden = decoded.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        output = DellaOutput(
            logits=self.head(hidden[:, keep]),
            past_key_values=decoded.past_key_values,
            latents=latents,
        )
        if sample is not None:
            unpadded = attention_mask.bool()
            output.reconstruction_nll = self._nll_of_hidden(hidden[:, :-1], input_ids, unpadded)
            output.kl_per_layer = sample.kl_per_layer
            output.num_predicted = _predicted(unpadded).sum(-1)
            output.posteriors, output.priors = sample.posteriors, sample.priors
        return output

    @torch.no_grad()
    def generate(
        self,
        inputs: Int[Tensor, "batch time"] | None = None,
        *,
        latents: Float[Tensor, "batch layers latent"] | None = None,
        num_documents: int | None = None,
        noise: Float[Tensor, "batch layers latent"] | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate` under latents, given or drawn from the prior.

        Without `inputs`, each document starts from BOS. Without `latents`, they are drawn with
        `noise` or `generator`, for as many documents as `inputs`, `noise` or `num_documents` say
        (else 1). Beams and `num_return_sequences` of a document share its latents. All else
        (do_sample, num_beams, top_k, max_new_tokens, …) is transformers'. Returns token ids
        [documents, time], the start included.
        """
        inputs = kwargs.pop("input_ids", inputs)
        if latents is None:
            count = num_documents if inputs is None else len(inputs)
            latents = self.sample_prior(count, noise=noise, generator=generator)
        if inputs is None:
            inputs = self._beginnings(len(latents))
        self._check_latents("latents", latents, len(inputs))
        self._check_room(inputs, kwargs.get("max_new_tokens"))
        # Given always: where padding and BOS are one id, transformers would take BOS for padding.
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = torch.ones_like(inputs)
        return super().generate(inputs, latents=latents, **kwargs)

    def sample_prior(
        self,
        num_documents: int | None = None,
        *,
        noise: Float[Tensor, "batch layers latent"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch layers latent"]:
        """z_l ~ p(z_l | z_<l), for `num_documents` (default 1) or one for each row of `noise`."""
        if noise is None:
            noise = self.draw_noise(num_documents or 1, generator=generator)
        return self.chain.sample_prior(noise)

    def draw_noise(
        self, *leading: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*leading layers latent"]:
        """N(0, I) of shape [*leading, L, p], in float32 or more, on the model's device.

        Drawn on the generator's own device, so that a CPU generator gives the same everywhere.
        """
        shape = (*leading, self.config.num_latent_layers, self.config.latent_size)
        dtype = torch.promote_types(self.dtype, torch.float32)
        device = self.device if generator is None else generator.device
        return torch.randn(shape, generator=generator, dtype=dtype, device=device).to(self.device)

    # --- parts -----------------------------------------------------------------------------------

    @property
    def trunk(self) -> PreTrainedModel:
        """The backbone's blocks: token ids in, hidden states out."""
        return self._adapter.trunk(self.backbone)

    @property
    def encoder_trunk(self) -> PreTrainedModel:
        """The blocks of the bidirectional pass: the decoder's own, or a second backbone's."""
        return self.encoder if self.config.encoder == "separate" else self.trunk

    @property
    def head(self) -> VocabularyHead:
        """The backbone's `lm_head`; again after its vocabulary was resized."""
        return VocabularyHead.adopt(self.backbone.get_output_embeddings())

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Into the backbone."""
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The backbone's."""
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Into the backbone."""
        self.backbone.set_output_embeddings(new_embeddings)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """transformers', then each part's own start; weights that were loaded stay.

        Not through `_init_weights`: for classes outside its own package transformers passes over
        modules that hold parameters only in their children, and it lets the backbone draw the
        fusions inside it.
        """
        super().initialize_weights()
        for module in self.latent_modules():
            module.reset_parameters()

    def latent_modules(self) -> list[Fusion | LatentChain | Pooling]:
        """All that is there for the latents and not in the backbone; a second encoder is not."""
        kinds = Fusion | LatentChain | Pooling
        return [module for module in self.modules() if isinstance(module, kinds)]

    def _decode(
        self,
        input_ids: Int[Tensor, "batch time"],
        latents: Float[Tensor, "batch layers latent"],
        **kwargs: Any,
    ) -> Any:
        """The trunk under latents; the one place where they enter, inside its layers or outside."""
        tokens: dict[str, Tensor] = {"input_ids": input_ids}
        if self.embedding_shift is not None:
            embeddings = self.backbone.get_input_embeddings()(input_ids)
            tokens = {"inputs_embeds": self.embedding_shift(embeddings, latents)}
        decoded = self.trunk(**tokens, latents=latents, **kwargs)
        if self.output_shift is not None:
            decoded.last_hidden_state = self.output_shift(decoded.last_hidden_state, latents)
        return decoded

    def _nll_of_hidden(
        self,
        hidden: Float[Tensor, "batch before hidden"],
        input_ids: Int[Tensor, "batch time"],
        unpadded: Bool[Tensor, "batch time"],
    ) -> Float[Tensor, " batch"]:
        """Σ_t −log p(x_t | x_<t, z), from the hidden states of all positions but the last."""
        predicted = _predicted(unpadded)[:, 1:]
        token_nll = self.head(hidden[predicted], targets=input_ids[:, 1:][predicted])
        # Back into rows: a sum along a row has one order, a scattered sum has none on a GPU.
        rows = token_nll.new_zeros(predicted.shape)
        return rows.masked_scatter(predicted, token_nll).sum(-1)

    def _beginnings(self, count: int) -> Int[Tensor, "batch 1"]:
        bos = self.generation_config.bos_token_id
        if bos is None:
            raise InputError(
                "generate: expected inputs or a bos_token_id in the backbone's configuration, got "
                "neither: a document has to start somewhere; pass inputs=… or set bos_token_id."
            )
        return torch.full((count, 1), bos, dtype=torch.long, device=self.device)

    def _check_length(self, input_ids: Tensor) -> None:
        longest = self.config.backbone.max_position_embeddings
        if input_ids.shape[1] > longest:
            raise InputError(
                f"input_ids: expected at most {longest} positions, got {input_ids.shape[1]}: the "
                "backbone has no more; cut or drop longer documents in preprocessing."
            )

    def _check_room(self, inputs: Tensor, max_new_tokens: int | None) -> None:
        longest = self.config.backbone.max_position_embeddings
        # The last new token is never read again, so it needs no position.
        room = longest - inputs.shape[1] + 1
        if max_new_tokens is not None and max_new_tokens > room:
            raise InputError(
                f"max_new_tokens: expected at most {room}, got {max_new_tokens}: the backbone has "
                f"{longest} positions and the inputs take {inputs.shape[1]}; lower it."
            )

    def _check_latents(self, name: str, given: Tensor, batch: int) -> None:
        expected = (batch, self.config.num_latent_layers, self.config.latent_size)
        if given.shape[-3:] != expected:
            raise InputError(
                f"{name}: expected shape [documents, latent layers, latent size] = "
                f"{list(expected)}, got {list(given.shape)}: each document has its own latents."
            )

    def _check_no_cache(self, past_key_values: Any) -> None:
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            raise InputError(
                "forward: expected latents together with past_key_values, got none: they cannot "
                "be inferred from a part of a document; pass the latents of the cached part."
            )


def _keep_weights(loaded: PreTrainedModel) -> None:
    """Its weights are loaded: not to be drawn anew."""
    for module in loaded.modules():
        module._is_hf_initialized = True


def _positions(unpadded: Bool[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Counted from each document's first token, so that left padding does not shift them."""
    return (unpadded.long().cumsum(-1) - 1).clamp(min=0)


def _predicted(unpadded: Bool[Tensor, "batch time"]) -> Bool[Tensor, "batch time"]:
    """True where a token is predicted: unpadded, and not its document's first, which is BOS."""
    return unpadded & (unpadded.long().cumsum(-1) > 1)


AutoModel.register(DellaConfig, Della, exist_ok=True)
AutoModelForCausalLM.register(DellaConfig, Della, exist_ok=True)
