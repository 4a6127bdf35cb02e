"""Documents generated under latents: transformers' `generate`, with what a latent model adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin

from della_model.condition import Condition, Reading, beside, padded_left
from della_model.errors import InputError
from della_model.routing import folded_fusions
from della_model.shapes import Float, Int


class GenerationInterface:
    """`Della.generate`: it prepares what transformers' `generate` then works on.

    A base of `Della`, which each `self` is; typed `Any`, for a base cannot know what it becomes.
    """

    @torch.no_grad()
    def generate(
        self: Any,
        inputs: Int[Tensor, "batch time"] | None = None,
        *,
        latents: Float[Tensor, "batch layers latent"] | None = None,
        condition: Condition | Reading | None = None,
        num_documents: int | None = None,
        noise: Float[Tensor, "batch layers latent"] | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate` under latents, given or drawn from the prior.

        Without `inputs`, each document starts from BOS. Without `latents`, they are drawn with
        `noise` or `generator`, for as many documents as `inputs`, `condition`, `noise` or
        `num_documents` say (else 1). Beams and `num_return_sequences` of a document share its
        latents. All else (do_sample, num_beams, top_k, max_new_tokens, …) is transformers'. Returns
        token ids [documents, time], the start included, a source never.
        """
        inputs = kwargs.pop("input_ids", inputs)
        reading = self._read(condition)
        if latents is None:
            count = num_documents if inputs is None else len(inputs)
            latents = self.sample_prior(count, noise=noise, generator=generator, condition=reading)
        if inputs is None:
            inputs = self._beginnings(len(latents))
        self._check_latents("latents", latents, len(inputs))
        # Given always: where padding and BOS are one id, transformers would take BOS for padding.
        mask = kwargs.pop("attention_mask", None)
        mask = torch.ones_like(inputs) if mask is None else mask
        prompts = inputs
        if reading is not None and reading.states is not None:
            kwargs["encoder_hidden_states"] = reading.states
            kwargs["encoder_attention_mask"] = reading.condition.attention_mask.long()
            if kwargs.get("use_cache", True):
                kwargs.setdefault(
                    "past_key_values", EncoderDecoderCache(DynamicCache(), DynamicCache())
                )
        elif reading is not None:
            inputs, mask = padded_left(beside(reading.condition, Condition(inputs, mask)))
        self._check_room(mask, kwargs.get("max_new_tokens"))
        with folded_fusions(self.trunk, self._or_constant(latents, len(latents))):
            found = GenerationMixin.generate(
                self, inputs, latents=latents, attention_mask=mask, **kwargs
            )
        if inputs is prompts:
            return found
        ids = found if isinstance(found, Tensor) else found.sequences
        prompts = prompts.repeat_interleave(len(ids) // len(prompts), dim=0)
        ids = torch.cat([prompts, ids[:, inputs.shape[1] :]], dim=1)
        if isinstance(found, Tensor):
            return ids
        found.sequences = ids
        return found

    def _beginnings(self: Any, count: int) -> Int[Tensor, "batch 1"]:
        bos = self.generation_config.bos_token_id
        if bos is None:
            bos = self._adapter.start_id(self.config.backbone)
        if bos is None:
            raise InputError(
                "generate: expected inputs or a bos_token_id in the backbone's configuration, got "
                "neither: a document has to start somewhere; pass inputs=… or set bos_token_id."
            )
        return torch.full((count, 1), bos, dtype=torch.long, device=self.device)

    def _check_room(self: Any, attention_mask: Tensor, max_new_tokens: int | None) -> None:
        longest, taken = self.config.context, int(attention_mask.sum(-1).max())
        # The last new token is never read again, so it needs no position.
        room = longest - taken + 1
        if max_new_tokens is not None and max_new_tokens > room:
            raise InputError(
                f"max_new_tokens: expected at most {room}, got {max_new_tokens}: the backbone has "
                f"{longest} positions and the inputs take {taken}; lower it."
            )
