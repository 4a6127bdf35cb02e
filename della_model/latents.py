"""The chain of latents: priors p(z_l | z_<l) and posteriors q(z_l | z_<l, x), layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init

from della_model.gaussian import DiagonalGaussian, at_least_float32
from della_model.shapes import Float

# Standard deviation of a posterior's loc when training starts, in units of the prior's scale, for
# features of unit variance: a KL of 0.02 nats a dimension, a signal to learn from at little cost.
_INITIAL_LOC_STD = 0.2


@dataclass(frozen=True)
class LatentSample:
    """One draw from the posterior, with the distributions that it was drawn from.

    `posteriors[l]` and `priors[l]` both condition on this draw's own `latents[..., :l, :]`.
    """

    latents: Float[Tensor, "*batch layers latent"]
    posteriors: list[DiagonalGaussian]
    priors: list[DiagonalGaussian]

    @property
    def kl_per_layer(self) -> Float[Tensor, "*batch layers"]:
        """KL(q(z_l | z_<l, x) ‖ p(z_l | z_<l)) in nats, in closed form given the draw's z_<l."""
        return self.kl_per_dimension.sum(-1)

    @property
    def kl_per_dimension(self) -> Float[Tensor, "*batch layers latent"]:
        """`kl_per_layer` before the sum over a layer's dimensions, in nats."""
        if not self.posteriors:
            return self.latents
        pairs = zip(self.posteriors, self.priors, strict=True)
        return torch.stack([q.kl_per_dimension(p) for q, p in pairs], dim=-2)

    @property
    def log_posterior(self) -> Float[Tensor, "*batch layers"]:
        """log q(z_l | z_<l, x) of the draw, in nats."""
        return _log_prob_per_layer(self.posteriors, self.latents)

    @property
    def log_prior(self) -> Float[Tensor, "*batch layers"]:
        """log p(z_l | z_<l) of the draw, in nats."""
        return _log_prob_per_layer(self.priors, self.latents)


def _log_prob_per_layer(
    gaussians: list[DiagonalGaussian], latents: Float[Tensor, "*batch layers latent"]
) -> Float[Tensor, "*out layers"]:
    if not gaussians:
        return latents.sum(-1)
    values = latents.unbind(-2)
    return torch.stack([g.log_prob(z) for g, z in zip(gaussians, values, strict=True)], dim=-1)


class ConstantLatents(nn.Module):
    """Latents that are learnt and the same for all documents, in place of a chain.

    They tell nothing about a document: under them the decoder is a plain language model that has
    all of a DELLA's parameters but those that infer.
    """

    def __init__(self, num_layers: int, latent_size: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.empty(num_layers, latent_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A draw from N(0, I): at 0 a product with them would have no gradient."""
        init.normal_(self.values)

    def forward(self, count: int) -> Float[Tensor, "count layers latent"]:
        """The same for each of `count` documents."""
        return self.values.expand(count, -1, -1)


class LatentChain(nn.Module):
    """h_l = tanh(W_hh h_{l-1} + W_ih z_{l-1}), h_1 = 0; p from h_l, q from [h_l; x_l].

    - p(z_1) = N(0, I), fixed: a learnt first prior would only shift what the chain can shift.
    - p(z_l | z_<l) = N(μ, diag σ²), `[μ; log σ] = W_p h_l + b_p`; starts as N(0, I).
    - q(z_l | z_<l, x) = N(μ, diag σ²), `[μ; log σ] = W_qx x_l + W_qh h_l + b_q`, which is one
      linear map of [h_l; x_l]; written in two so that every (z, x) pair of an evaluation set costs
      a sum and not a product. Starts at scale 1 with a small loc.

    Not `linked`, the latents are independent: every h_l is 0, so p(z_l) = N(0, I) and q(z_l | x) is
    from x_l alone. With one layer that is the usual variational autoencoder; with none there are no
    latents, and every sum over them is 0.

    `conditional`, features are [x_l; c_l], of the document and of its condition. Then every prior
    depends on the condition too: p from [h_l; c_l], the first from c_1 alone, and q from
    [h_l; x_l; c_l]. What c_l is mapped by starts at zero: at the start the condition says nothing
    of the latents.

    Layers count from 0 in code. All leading dimensions broadcast: features [B, L, H] with noise
    [K, B, L, p] give K draws a document. Where `condition` is asked for, it is c_l [B, L, H] of a
    conditional chain, else None.
    """

    def __init__(
        self,
        num_layers: int,
        latent_size: int,
        feature_size: int,
        linked: bool = True,
        conditional: bool = False,
    ) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.latent_size = latent_size
        self.feature_size = feature_size
        self.linked = linked
        self.conditional = conditional
        later = range(1, num_layers) if linked else range(0)

        def linears(layers: range, inputs: int, outputs: int, bias: bool) -> nn.ModuleList:
            return nn.ModuleList(nn.Linear(inputs, outputs, bias=bias) for _ in layers)

        # Layer 0 has no predecessor and layer 1's is h_0 = 0: matrices there would never learn.
        self.latent_to_summary = linears(later, latent_size, latent_size, bias=False)
        self.summary_to_summary = linears(later[1:], latent_size, latent_size, bias=False)
        self.prior_heads = linears(later, latent_size, 2 * latent_size, bias=True)
        self.posterior_from_summary = linears(later, latent_size, 2 * latent_size, bias=False)
        self.posterior_from_features = linears(
            range(num_layers), (1 + conditional) * feature_size, 2 * latent_size, bias=True
        )
        every = range(num_layers if conditional else 0)
        # A bias where there is no prior head, which has one.
        self.prior_from_condition = nn.ModuleList(
            nn.Linear(feature_size, 2 * latent_size, bias=layer not in later) for layer in every
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Posterior near the prior but alive; priors at N(0, I); an orderly chain."""
        for parameter in (
            *self.prior_heads.parameters(),
            *self.posterior_from_summary.parameters(),
            *self.prior_from_condition.parameters(),
        ):
            init.zeros_(parameter)
        for head in self.posterior_from_features:
            # Rows of μ, then rows of log σ, which start at zero. One copy of the whole matrix,
            # because the initialisers leave loaded parameters alone and know them only as a whole.
            width = (1 + self.conditional) * self.feature_size
            weight = torch.zeros(2 * self.latent_size, width)
            of_document = weight[: self.latent_size, : self.feature_size]
            of_document.normal_(std=_INITIAL_LOC_STD * self.feature_size**-0.5)
            init.copy_(head.weight, weight)
            init.zeros_(head.bias)
        for transition in (*self.latent_to_summary, *self.summary_to_summary):
            init.normal_(transition.weight, std=self.latent_size**-0.5)

    def infer(
        self,
        features: Float[Tensor, "*documents layers hidden"],
        noise: Float[Tensor, "*draws layers latent"],
    ) -> LatentSample:
        """z_l ~ q(z_l | z_<l, x) by reparametrisation, layer after layer."""
        posteriors: list[DiagonalGaussian] = []

        def draw(layer: int, summary: Tensor | None) -> Tensor:
            posterior = self._posterior(layer, features[..., layer, :], summary)
            posteriors.append(posterior)
            return posterior.rsample(noise[..., layer, :])

        condition = features[..., self.feature_size :] if self.conditional else None
        latents, priors = self._run(draw, noise, condition)
        return LatentSample(latents, posteriors, priors)

    def sample_prior(
        self,
        noise: Float[Tensor, "*batch layers latent"],
        condition: Float[Tensor, "*documents layers hidden"] | None = None,
    ) -> Float[Tensor, "*batch layers latent"]:
        """z_l ~ p(z_l | z_<l), layer after layer."""

        def draw(layer: int, summary: Tensor | None) -> Tensor:
            prior = self._prior(layer, summary, noise, condition)
            return prior.rsample(noise[..., layer, :])

        return self._run(draw, noise, condition)[0]

    def log_prior(
        self,
        latents: Float[Tensor, "*batch layers latent"],
        condition: Float[Tensor, "*documents layers hidden"] | None = None,
    ) -> Float[Tensor, "*batch layers"]:
        """log p(z_l | z_<l) in nats, for any latents."""
        priors = self._run(lambda layer, _: latents[..., layer, :], latents, condition)[1]
        return _log_prob_per_layer(priors, latents)

    def log_posterior(
        self,
        features: Float[Tensor, "*documents layers hidden"],
        latents: Float[Tensor, "*draws layers latent"],
    ) -> Float[Tensor, "*pairs layers"]:
        """log q(z_l | z_<l, x) in nats, for any latents and documents.

        Leading dimensions broadcast: features [N, 1, L, H] and latents [1, M, L, p] give [N, M, L].
        """
        posteriors: list[DiagonalGaussian] = []

        def given(layer: int, summary: Tensor | None) -> Tensor:
            posteriors.append(self._posterior(layer, features[..., layer, :], summary))
            return latents[..., layer, :]

        self._run(given, latents)
        return _log_prob_per_layer(posteriors, latents)

    def posterior_terms_of_features(
        self, features: Float[Tensor, "*documents layers hidden"]
    ) -> Float[Tensor, "*documents layers parameters"]:
        """A document's part of each posterior's `[μ; raw log σ]`: W_qx x_l + b_q.

        With `posterior_terms_of_latents`, whose sum with it is the whole, this is all that an
        estimate over many (z, x) pairs needs: the features are not looked at again.
        """
        heads = enumerate(self.posterior_from_features)
        terms = [head(features[..., layer, :]) for layer, head in heads]
        return at_least_float32(torch.stack(terms, dim=-2))

    def posterior_terms_of_latents(
        self, latents: Float[Tensor, "*draws layers latent"]
    ) -> Float[Tensor, "*draws layers parameters"]:
        """A draw's part of each posterior's `[μ; raw log σ]`: W_qh h_l, of its own z_<l."""
        terms: list[Tensor] = []

        def given(layer: int, summary: Tensor | None) -> Tensor:
            zero = latents.new_zeros(*latents.shape[:-2], 2 * self.latent_size)
            terms.append(
                zero if summary is None else self.posterior_from_summary[layer - 1](summary)
            )
            return latents[..., layer, :]

        self._run(given, latents)
        return torch.stack([at_least_float32(term) for term in terms], dim=-2)

    def _run(
        self,
        next_latent: Callable[[int, Tensor | None], Tensor],
        like: Tensor,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, list[DiagonalGaussian]]:
        """Walks the chain: `next_latent(layer, h_l)` gives z_l; returns all z and the priors."""
        latents: list[Tensor] = []
        priors: list[DiagonalGaussian] = []
        summary: Tensor | None = None
        for layer in range(self.num_layers):
            if self.linked and layer > 0:
                summary = self._next_summary(layer, summary, latents[-1])
            priors.append(self._prior(layer, summary, like, condition))
            latents.append(next_latent(layer, summary))
        if not latents:
            return like[..., :0, :], priors
        return torch.stack(latents, dim=-2), priors

    def _next_summary(self, layer: int, previous: Tensor | None, latent: Tensor) -> Tensor:
        # h_l = tanh(W_hh h_{l-1} + W_ih z_{l-1}); `previous` is None where h_{l-1} = 0.
        # Latents are float32; the module may be bfloat16.
        dtype = next(self.parameters()).dtype
        total = self.latent_to_summary[layer - 1](latent.to(dtype))
        if previous is not None:
            total = total + self.summary_to_summary[layer - 2](previous)
        return torch.tanh(total)

    def _prior(
        self, layer: int, summary: Tensor | None, like: Tensor, condition: Tensor | None
    ) -> DiagonalGaussian:
        terms: list[Tensor] = []
        if summary is not None:
            terms.append(self.prior_heads[layer - 1](summary))
        if condition is not None:
            raw = self.prior_from_condition[layer](condition[..., layer, :])
            # As many as there are draws, also where nothing of theirs enters.
            shape = torch.broadcast_shapes(raw.shape[:-1], like.shape[:-2])
            terms.append(raw.expand(*shape, -1))
        if terms:
            return DiagonalGaussian.from_raw(sum(terms[1:], terms[0]))
        shape = (*like.shape[:-2], self.latent_size)
        return DiagonalGaussian.standard(*shape, dtype=like.dtype, device=like.device)

    def _posterior(self, layer: int, features: Tensor, summary: Tensor | None) -> DiagonalGaussian:
        raw = self.posterior_from_features[layer](features)
        if summary is not None:
            raw = raw + self.posterior_from_summary[layer - 1](summary)
        return DiagonalGaussian.from_raw(raw)
