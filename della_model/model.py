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
from della_model.backbones.base import Encoded, encode
from della_model.condition import Condition, Joined, Reading
from della_model.config import DellaConfig, check_supported
from della_model.errors import InputError
from della_model.fusion import FUSIONS, Fusion, LatentMemory, Shift
from della_model.gaussian import at_least_float32
from della_model.generation import GenerationInterface
from della_model.head import VocabularyHead
from della_model.hub import HubInterface
from della_model.latents import ConstantLatents, LatentChain, LatentSample
from della_model.outputs import DellaOutput, ElboTerms
from della_model.pooling import Pooling
from della_model.routing import place_fusion, place_memory, route_latent
from della_model.shapes import Bool, Float, Int
from della_model.texts import TextInterface

# Options of `from_pretrained` that say which files are meant: the configuration's too.
_SOURCE_OPTIONS = {"revision", "subfolder", "cache_dir", "token", "local_files_only"}


class Della(TextInterface, HubInterface, GenerationInterface, PreTrainedModel, GenerationMixin):
    """Encoder and decoder are one backbone, run twice, or two of one shape.

    1. `features`: the encoder without latents, every position seeing every other; hidden states
       after each latent layer are pooled over unpadded positions to x_l.
    2. `infer`: the chain draws z_l ~ q(z_l | z_<l, x).
    3. `reconstruction_nll`: the backbone, causal, under the latents: layer l's attention values
       fused with z_l, or another of the ways in `fusion`.

    A document is BOS, its tokens, EOS; `attention_mask` is 1 on them and 0 on padding, which stands
    at the right or at the left and changes nothing. Token ids are never asked what padding is: in
    GPT-2, BOS, EOS and padding are one id.

    A conditional model has a `condition` c wherever it has documents: priors are p(z_l | z_<l, c),
    posteriors q(z_l | z_<l, x, c), and the decoder reads c before x or looks at it. `read` makes of
    it what all three steps need.
    """

    config_class = DellaConfig
    base_model_prefix = "della"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
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
        if not config.conditional:
            for module in adapter.cross_attentions(backbone):
                module.requires_grad_(False)  # it never runs
        if config.encoder == "separate" and config.num_latent_layers:
            if encoder is None:
                encoder = adapter.encoder(adapter.build(copy.deepcopy(config.backbone)))
            else:
                _keep_weights(encoder)
            self.encoder = encoder
        self._place_fusions()
        hidden_size = config.backbone.hidden_size
        self.pooling = nn.ModuleList(
            Pooling(hidden_size, config.pooling) for _ in config.feature_layers
        )
        self.condition_pooling = nn.ModuleList(
            Pooling(hidden_size, config.pooling)
            for _ in (config.feature_layers if config.conditional else ())
        )
        self.chain = LatentChain(
            config.num_latent_layers,
            config.latent_size,
            hidden_size,
            linked=config.latents == "layerwise",
            conditional=config.conditional,
        )
        self.constant_latents = None
        if config.latents == "constant":
            self.constant_latents = ConstantLatents(config.num_decoder_latents, config.latent_size)
        self.post_init()
        self._begin_as_documents()

    def _begin_as_documents(self) -> None:
        """Documents begin with BOS alone, where an encoder–decoder's own targets force more."""
        for name in ("forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id"):
            setattr(self.generation_config, name, None)

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
                place_fusion(attention, fusion, slot)
            if slot is not None and entry.memory:
                heads = attention.num_heads, attention.head_size
                place_memory(attention, LatentMemory(*heads, config.latent_size))
            route_latent(attention, slot)
        shape = config.num_decoder_latents, config.latent_size, config.backbone.hidden_size
        has_latents = config.num_decoder_latents > 0
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
        # Said in words: left open, transformers asks at the terminal.
        trusted = options.pop("trust_remote_code", False)
        backbone_config = AutoConfig.from_pretrained(
            folder_or_hub_id, trust_remote_code=trusted, **where
        )
        check_supported(backbone_config.model_type)
        # Before the weights are read, so that a wrong option costs no wait.
        DellaConfig(backbone=backbone_config, **della_options)
        adapter = BACKBONES[backbone_config.model_type]
        backbone = adapter.load(folder_or_hub_id, **options)
        config = DellaConfig(backbone=backbone.config, **della_options)
        encoder = None
        if config.encoder == "separate":
            encoder = adapter.encoder(adapter.load(folder_or_hub_id, **options))
        model = cls(config, backbone=backbone, encoder=encoder)
        model.generation_config = copy.deepcopy(backbone.generation_config)
        model._begin_as_documents()
        model.config.dtype = backbone.dtype
        return model.to(backbone.dtype)

    # --- the three steps -------------------------------------------------------------------------

    def features(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
        condition: Condition | Reading | None = None,
    ) -> Float[Tensor, "batch layers features"]:
        """x_l for each latent, or [x_l; c_l]: pooled hidden states of the bidirectional pass."""
        reading = self._read(condition)
        features = self._no_features(input_ids)
        if self.config.feature_layers:
            encoded = self._encode(self.encoder_trunk, input_ids, attention_mask)
            features = _pooled(self.pooling, encoded, attention_mask)
        return features if reading is None else torch.cat([features, reading.features], dim=-1)

    def read(self, condition: Condition | Reading) -> Reading:
        """c_l for each latent, and what the decoder looks at; one pass of the encoder."""
        if isinstance(condition, Reading):
            return condition
        ids, mask = condition
        features = self._no_features(ids)
        states = None
        is_encoder_decoder = self._adapter.is_encoder_decoder
        if self.config.feature_layers or is_encoder_decoder:
            encoded = self._encode(self.encoder_trunk, ids, mask)
            states = encoded.last if is_encoder_decoder else None
            if self.config.feature_layers:
                features = _pooled(self.condition_pooling, encoded, mask)
        return Reading(condition, features, states)

    def infer(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
        noise: Float[Tensor, "*draws batch layers latent"],
        condition: Condition | Reading | None = None,
    ) -> LatentSample:
        """z_l ~ q(z_l | z_<l, x, c); noise ~ N(0, I), with leading dimensions for more draws."""
        self._check_latents("noise", noise, len(input_ids))
        return self.chain.infer(self.features(input_ids, attention_mask, condition), noise)

    def reconstruction_nll(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
        latents: Float[Tensor, "batch layers latent"],
        condition: Condition | Reading | None = None,
        decoder_input_ids: Int[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """−log p(x | z, c) in nats, summed over predicted tokens: all but BOS and padding of x.

        `decoder_input_ids`: what the decoder reads in place of the document (word dropout).
        """
        reading = self._read(condition)
        self._check_length(input_ids, reading)
        self._check_latents("latents", latents, len(input_ids))
        # The last column is only ever predicted, whichever side the padding is on.
        unpadded = attention_mask.bool()
        read = input_ids if decoder_input_ids is None else decoder_input_ids
        inputs, known = read[:, :-1], unpadded[:, :-1]
        if inputs.shape[1] == 0:
            return at_least_float32(latents).new_zeros(len(input_ids))
        hidden = self._decode(
            inputs,
            latents,
            attention_mask=known.long(),
            reading=reading,
            use_cache=False,
        ).last_hidden_state
        return self._nll_of_hidden(hidden, input_ids, unpadded)

    def elbo_terms(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
        noise: Float[Tensor, "batch layers latent"],
        condition: Condition | Reading | None = None,
        decoder_input_ids: Int[Tensor, "batch time"] | None = None,
    ) -> ElboTerms:
        """The terms of log p(x | z, c) − Σ_l KL(q_l ‖ p_l) under one draw z ~ q(z | x, c)."""
        reading = self._read(condition)
        sample = self.infer(input_ids, attention_mask, noise, reading)
        nll = self.reconstruction_nll(
            input_ids, attention_mask, sample.latents, reading, decoder_input_ids
        )
        num_predicted = predicted_tokens(attention_mask.bool()).sum(-1)
        return ElboTerms(nll, sample.kl_per_layer, num_predicted, sample)

    # --- transformers' interface -----------------------------------------------------------------

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Tensor | None = None,
        latents: Float[Tensor, "batch layers latent"] | None = None,
        noise: Float[Tensor, "batch layers latent"] | None = None,
        condition: Condition | Reading | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> DellaOutput:
        """The decoder under `latents`, or, without them, under latents inferred from the input.

        In the second case the terms of the ELBO come along. `attention_mask` covers cached
        positions too. `logits_to_keep`: the last n positions only, or those of an index; 0 for all.
        In generation, what is known of a condition comes as the beginning of `input_ids`, or for an
        encoder–decoder backbone as `encoder_hidden_states`; else it is given as `condition`.
        """
        reading = None if condition is None else self.read(condition)
        if attention_mask is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            batch, time = input_ids.shape
            attention_mask = input_ids.new_ones(batch, past + time)
        sample = None
        if latents is None:
            self._check_no_cache(past_key_values)
            noise = self.draw_noise(len(input_ids)) if noise is None else noise
            sample = self.infer(input_ids, attention_mask, noise, reading)
            latents = sample.latents
        self._check_latents("latents", latents, len(input_ids))
        if encoder_hidden_states is not None:
            kwargs["encoder_hidden_states"] = encoder_hidden_states
            kwargs["encoder_attention_mask"] = encoder_attention_mask
        decoded = self._decode(
            input_ids,
            latents,
            attention_mask=attention_mask,
            position_ids=position_ids,
            reading=reading,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
            **kwargs,
        )
        hidden = decoded.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        output = DellaOutput(
            logits=self._scores(hidden[:, keep]),
            past_key_values=decoded.past_key_values,
            latents=latents,
        )
        if sample is not None:
            unpadded = attention_mask.bool()
            output.reconstruction_nll = self._nll_of_hidden(hidden[:, :-1], input_ids, unpadded)
            output.kl_per_layer = sample.kl_per_layer
            output.num_predicted = predicted_tokens(unpadded).sum(-1)
            output.posteriors, output.priors = sample.posteriors, sample.priors
        return output

    def sample_prior(
        self,
        num_documents: int | None = None,
        *,
        noise: Float[Tensor, "batch layers latent"] | None = None,
        generator: torch.Generator | None = None,
        condition: Condition | Reading | None = None,
    ) -> Float[Tensor, "batch layers latent"]:
        """z_l ~ p(z_l | z_<l, c), one for each source of `condition` or row of `noise`.

        Without either, for `num_documents` (default 1).
        """
        reading = self._read(condition)
        conditions = None if reading is None else reading.features
        if noise is None:
            count = num_documents or (1 if conditions is None else len(conditions))
            noise = self.draw_noise(count, generator=generator)
        return self.chain.sample_prior(noise, conditions)

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
        """The blocks of the bidirectional pass: the backbone's own, or those of a second one."""
        is_separate = self.config.encoder == "separate"
        return self.encoder if is_separate else self._adapter.encoder(self.backbone)

    def blocks(self) -> list[nn.Module]:
        """The backbone's layers, of decoder and encoder: what is compiled or checkpointed."""
        trunks = {id(trunk): trunk for trunk in (self.trunk, self.encoder_trunk)}
        lists = [m for t in trunks.values() for m in t.children() if isinstance(m, nn.ModuleList)]
        return [block for blocks in lists for block in blocks]

    @property
    def head(self) -> VocabularyHead:
        """The backbone's `lm_head`; again after its vocabulary was resized."""
        return VocabularyHead.adopt(self.backbone.get_output_embeddings())

    def latent_parts(self) -> list[tuple[str, Fusion | LatentChain | ConstantLatents | Pooling]]:
        """What the backbone has not: the modules that exist for the latents, by name."""
        kinds = Fusion | LatentChain | ConstantLatents | Pooling
        return [(name, part) for name, part in self.named_modules() if isinstance(part, kinds)]

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

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """The backbone's, which knows what else is as long as its vocabulary."""
        if self.config.encoder == "separate" and self.config.num_latent_layers:
            self.encoder.resize_token_embeddings(*args, **kwargs)
        return self.backbone.resize_token_embeddings(*args, **kwargs)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """transformers', then each part's own start; weights that were loaded stay.

        Not through `_init_weights`: for classes outside its own package transformers passes over
        modules that hold parameters only in their children, and it lets the backbone draw the
        fusions inside it.
        """
        super().initialize_weights()
        for _, part in self.latent_parts():
            part.reset_parameters()

    def _encode(self, encoder: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> Encoded:
        self._check_length(input_ids)
        unpadded, backbone = mask.bool(), self.config.backbone
        layers = [self._adapter.encoder_layer(backbone, n) for n in self.config.feature_layers]
        return encode(encoder, input_ids, unpadded, _positions(unpadded), layers)

    def _no_features(self, input_ids: Tensor) -> Float[Tensor, "batch none hidden"]:
        return self.head.weight.new_zeros(len(input_ids), 0, self.config.backbone.hidden_size)

    def _read(self, condition: Condition | Reading | None) -> Reading | None:
        if self.config.conditional != (condition is not None):
            wanted = "a condition" if self.config.conditional else "no condition"
            raise InputError(
                f"condition: expected {wanted} of this model, got "
                f"{'none' if condition is None else 'one'}: its priors are made for documents "
                f"{'with' if self.config.conditional else 'without'} sources; see "
                "DellaConfig.conditional."
            )
        return None if condition is None else self.read(condition)

    def _decode(
        self,
        input_ids: Int[Tensor, "batch time"],
        latents: Float[Tensor, "batch layers latent"],
        *,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        reading: Reading | None = None,
        **kwargs: Any,
    ) -> Any:
        """The hidden states of documents, behind their sources where they have some."""
        joined = None
        if reading is not None and reading.states is not None:
            kwargs["encoder_hidden_states"] = reading.states
            kwargs["encoder_attention_mask"] = reading.condition.attention_mask.long()
        elif reading is not None:
            joined = Joined.of(reading.condition, Condition(input_ids, attention_mask))
            input_ids, attention_mask = joined.input_ids, joined.attention_mask
            position_ids = None
        if position_ids is None and attention_mask.ndim == 2:
            position_ids = _positions(attention_mask.bool())[:, -input_ids.shape[1] :]
        start = self._adapter.start_id(self.config.backbone)
        if start is not None and position_ids is not None:
            input_ids = input_ids.masked_fill(position_ids == 0, start)
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        decoded = self._decode_tokens(input_ids, latents, **kwargs)
        if joined is not None:
            decoded.last_hidden_state = joined.of_documents(decoded.last_hidden_state)
        return decoded

    def _decode_tokens(
        self,
        input_ids: Int[Tensor, "batch time"],
        latents: Float[Tensor, "batch layers latent"],
        **kwargs: Any,
    ) -> Any:
        """The trunk under latents; the one place where they enter, inside its layers or outside."""
        tokens: dict[str, Tensor] = {"input_ids": input_ids}
        latents = self._or_constant(latents, len(input_ids))
        if self.embedding_shift is not None:
            embeddings = self.backbone.get_input_embeddings()(input_ids)
            tokens = {"inputs_embeds": self.embedding_shift(embeddings, latents)}
        decoded = self.trunk(**tokens, latents=latents, **kwargs)
        if self.output_shift is not None:
            decoded.last_hidden_state = self.output_shift(decoded.last_hidden_state, latents)
        return decoded

    def _or_constant(
        self, latents: Float[Tensor, "batch layers latent"], num_documents: int
    ) -> Float[Tensor, "batch entering latent"]:
        """What enters the decoder: these latents, or the constants in their place."""
        return latents if self.constant_latents is None else self.constant_latents(num_documents)

    def _nll_of_hidden(
        self,
        hidden: Float[Tensor, "batch before hidden"],
        input_ids: Int[Tensor, "batch time"],
        unpadded: Bool[Tensor, "batch time"],
    ) -> Float[Tensor, " batch"]:
        """Σ_t −log p(x_t | x_<t, z), from the hidden states of all positions but the last."""
        predicted = predicted_tokens(unpadded)[:, 1:]
        token_nll = self._scores(hidden[predicted], input_ids[:, 1:][predicted])
        # Back into rows: a sum along a row has one order, a scattered sum has none on a GPU.
        rows = token_nll.new_zeros(predicted.shape)
        return rows.masked_scatter(predicted, token_nll).sum(-1)

    def _scores(
        self, hidden: Float[Tensor, "*rows hidden"], targets: Int[Tensor, "*rows"] | None = None
    ) -> Float[Tensor, "*out"]:
        """The head's logits; with `targets`, their −log p in nats."""
        ready = self._adapter.before_head(self.backbone, hidden)
        return self.head(ready, targets, self._adapter.logits_bias(self.backbone))

    def _check_length(self, input_ids: Tensor, reading: Reading | None = None) -> None:
        longest, wanted = self.config.context, input_ids.shape[1]
        what = ""
        if reading is not None and reading.states is None:
            wanted += reading.condition.input_ids.shape[1]
            what = " for a source and its document"
        if wanted > longest:
            raise InputError(
                f"input_ids: expected at most {longest} positions{what}, got {wanted}: the "
                "backbone has no more; cut or drop longer documents in preprocessing."
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


def _pooled(poolings: nn.ModuleList, encoded: Encoded, mask: Tensor) -> Tensor:
    pairs = zip(poolings, encoded.of_layers, strict=True)
    return torch.stack([pool(hidden, mask.bool()) for pool, hidden in pairs], dim=1)


def _positions(unpadded: Bool[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Counted from each document's first token, so that left padding does not shift them."""
    return (unpadded.long().cumsum(-1) - 1).clamp(min=0)


def predicted_tokens(unpadded: Bool[Tensor, "batch time"]) -> Bool[Tensor, "batch time"]:
    """True where a token is predicted: unpadded, and not its document's first, which is BOS."""
    return unpadded & (unpadded.long().cumsum(-1) > 1)


AutoModel.register(DellaConfig, Della, exist_ok=True)
AutoModelForCausalLM.register(DellaConfig, Della, exist_ok=True)
