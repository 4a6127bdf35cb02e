"""The equations of a Della around GPT-2, one head, one layer and one token at a time, in float64.

Written for the tests alone: of the model they take weights, by their names in the state dict, and
none of its functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

Weights = dict[str, Tensor]


@dataclass
class Latents:
    """What enters a decoder: by layer for fused values and memories, whole for shifts."""

    of_layer: dict[int, Tensor] = field(default_factory=dict)
    all: Tensor | None = None


def norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean()
    scaled = centred / (centred.square().mean() + 1e-5).sqrt()
    return weights[f"{name}.weight"] * scaled + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def conv(weights: Weights, name: str, x: Tensor) -> Tensor:
    """GPT-2 keeps its matrices transposed."""
    return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    out = weights[f"{name}.weight"] @ x
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def low_rank(weights: Weights, name: str, value: Tensor, z: Tensor, rank: int) -> Tensor:
    """v + Σ_r (W_v^r [v; 1]) ∘ (W_z^r [z; 1])."""
    from_value = linear(weights, f"{name}.value_factor", value).split(len(value))
    from_latent = linear(weights, f"{name}.latent_factor", z).split(len(value))
    return value + sum(from_value[r] * from_latent[r] for r in range(rank))


def hidden_states(
    weights: Weights, trunk: str, config: Any, tokens: list[int], latents: Latents | None
) -> list[list[Tensor]]:
    """States after the embeddings and each layer, by position; no latents: bidirectional."""
    backbone, causal = config.backbone, latents is not None
    latents = latents or Latents()
    heads, width = backbone.n_head, backbone.n_embd // backbone.n_head
    states = [
        weights[f"{trunk}.wte.weight"][token] + weights[f"{trunk}.wpe.weight"][place]
        for place, token in enumerate(tokens)
    ]
    if latents.all is not None and "embedding_shift.latents_to_hidden.weight" in weights:
        shift = weights["embedding_shift.latents_to_hidden.weight"] @ latents.all
        states = [state + shift for state in states]
    found = [states]
    for layer in range(backbone.n_layer):
        block, z = f"{trunk}.h.{layer}", latents.of_layer.get(layer)
        attention = f"{block}.attn"
        has_fusion = f"{attention}.c_attn.projection.weight" in weights
        projection = f"{attention}.c_attn" + (".projection" if has_fusion else "")
        rows = [
            conv(weights, projection, norm(weights, f"{block}.ln_1", s)).chunk(3) for s in states
        ]
        values = [value for _, _, value in rows]
        if z is not None and has_fusion:
            fusion = f"{attention}.c_attn.fusion"
            values = [low_rank(weights, fusion, v, z, config.fusion_rank) for v in values]
        keys = [key for _, key, _ in rows]
        first = 0
        if z is not None and f"{attention}.latent_memory.key.weight" in weights:
            keys = [linear(weights, f"{attention}.latent_memory.key", z), *keys]
            values = [linear(weights, f"{attention}.latent_memory.value", z), *values]
            first = 1
        after = []
        for place, state in enumerate(states):
            visible = first + place + 1 if causal else len(keys)
            parts = []
            for head in range(heads):
                of_head = slice(head * width, (head + 1) * width)
                scores = [rows[place][0][of_head] @ k[of_head] for k in keys[:visible]]
                share = (torch.stack(scores) / math.sqrt(width)).softmax(0)
                parts.append(sum(s * v[of_head] for s, v in zip(share, values, strict=False)))
            state = state + conv(weights, f"{attention}.c_proj", torch.cat(parts))
            inner = gelu(conv(weights, f"{block}.mlp.c_fc", norm(weights, f"{block}.ln_2", state)))
            after.append(state + conv(weights, f"{block}.mlp.c_proj", inner))
        states = after
        found.append(states)
    found[-1] = [norm(weights, f"{trunk}.ln_f", state) for state in states]
    return found


def pooled(weights: Weights, name: str, states: list[Tensor]) -> Tensor:
    normed = [norm(weights, f"{name}.norm", state) for state in states]
    scores = torch.cat([linear(weights, f"{name}.score", state) for state in normed])
    return sum(share * state for share, state in zip(scores.softmax(0), normed, strict=True))


def gaussian(raw: Tensor) -> Independent:
    loc, log_scale = raw.chunk(2)
    return Independent(Normal(loc, (5 * torch.tanh(log_scale / 5)).exp()), 1)


@torch.no_grad()
def plain_elbo(
    model: Any, document: list[int], noise: Tensor, source: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """KL of each latent and −log p(x | z, c), in nats, of one document."""
    config = model.config
    weights = {name: value.double() for name, value in model.state_dict().items()}
    decoder = "backbone.transformer"
    encoder = "encoder" if config.encoder == "separate" else decoder
    layers = config.num_layers
    first, last = config.latent_layers or (0, layers - 1)
    places = {
        "layerwise": list(range(first, last + 1)),
        "independent": list(range(first, last + 1)),
        "single": [last],
        "constant": [],
        "none": [],
    }[config.latents]

    def features(tokens: list[int], pooling: str) -> list[Tensor]:
        states = hidden_states(weights, encoder, config, tokens, None)
        each = enumerate(places)
        return [pooled(weights, f"{pooling}.{i}", states[layer + 1]) for i, layer in each]

    x = features(document, "pooling")
    c = features(source, "condition_pooling") if source else None
    z: list[Tensor] = []
    kl: list[Tensor] = []
    h = torch.zeros(config.latent_size, dtype=torch.float64)
    for i in range(len(places)):
        seen = x[i] if c is None else torch.cat([x[i], c[i]])
        raw_q = linear(weights, f"chain.posterior_from_features.{i}", seen)
        raw_p = torch.zeros_like(raw_q)
        if c is not None:
            raw_p = raw_p + linear(weights, f"chain.prior_from_condition.{i}", c[i])
        if config.latents == "layerwise" and i > 0:
            total = linear(weights, f"chain.latent_to_summary.{i - 1}", z[-1])
            if i > 1:
                total = total + linear(weights, f"chain.summary_to_summary.{i - 2}", h)
            h = total.tanh()
            raw_p = raw_p + linear(weights, f"chain.prior_heads.{i - 1}", h)
            raw_q = raw_q + linear(weights, f"chain.posterior_from_summary.{i - 1}", h)
        q, p = gaussian(raw_q), gaussian(raw_p)
        z.append(q.mean + q.stddev * noise[i])
        kl.append(kl_divergence(q, p))
    if config.latents == "constant":
        z = list(weights["constant_latents.values"])
    latents = Latents(all=torch.cat(z) if z else None)
    for layer in range(first, last + 1):
        if z:
            latents.of_layer[layer] = z[0] if config.latents == "single" else z[layer - first]
    before = (source or []) + document
    states = hidden_states(weights, decoder, config, before[:-1], latents)[-1]
    if z and "output_shift.latents_to_hidden.weight" in weights:
        shift = weights["output_shift.latents_to_hidden.weight"] @ latents.all
        states = [state + shift for state in states]
    start = len(source or [])
    nll = torch.zeros((), dtype=torch.float64)
    for place in range(start, len(before) - 1):
        logits = weights[f"{decoder}.wte.weight"] @ states[place]
        nll = nll - logits.log_softmax(0)[before[place + 1]]
    return torch.stack(kl) if kl else torch.zeros(0, dtype=torch.float64), nll
