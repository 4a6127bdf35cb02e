"""What training minimises."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from della_model.bag_of_words import BagOfWords
from della_model.condition import Condition
from della_model.errors import ConfigError, unknown_name
from della_model.model import Della
from della_model.outputs import ElboTerms
from della_model.shapes import Bool, Float, Int

FREE_BITS_PER = ("batch", "document", "layer", "dimension")


class Objective(nn.Module):
    """loss = Σ_documents weight · (reconstruction_nll + β Σ_l max(KL_l, free_bits) + w · bow_nll).

    Encoder, chain, decoder and KL in one forward that returns one scalar: the module to hand to
    DDP, FSDP or DeepSpeed, whose hooks expect just that.

    With weight = 1 / (documents of the global batch), the sum of the losses over ranks and
    accumulation steps is the mean over the global batch, however it was divided. Where gradients
    are averaged over ranks or steps, the caller scales the weights by their number. Weight 0 marks
    a filler, which counts nowhere.

    Args:
        model: the Della to train.
        free_bits: nats of KL that each layer of each document has for nothing, or each dimension
            of each layer, or the whole document, whose layers share them as they like; below them
            the KL has no gradient. The reported KL is always the true one.
        free_bits_per: "document", "layer" or "dimension"; or "batch": the documents of a global
            batch have that many each on average, and share them (as the minibatch does in
            Kingma et al. 2016, arXiv 1606.04934).
        kl_layers: the latents whose KL is charged, counted from 0, or from the last by −1; None
            for all. One that is not charged is free to tell all it can.
        bag_of_words: w, the weight of `BagOfWords`, whose weights are the objective's own and no
            part of the model; 0 leaves it out.

    Raises ConfigError where a number cannot be, or does not fit the model.
    """

    def __init__(
        self,
        model: Della,
        free_bits: float = 0.0,
        free_bits_per: str = "layer",
        kl_layers: Sequence[int] | None = None,
        bag_of_words: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("free_bits", free_bits), ("bag_of_words", bag_of_words)):
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"{name}: expected a number of nats or a weight ≥ 0, got {value}: below 0 it "
                    "would reward what it should bound; give 0 to switch it off."
                )
        if free_bits_per not in FREE_BITS_PER:
            raise ConfigError(unknown_name("free_bits_per", free_bits_per, FREE_BITS_PER))
        self.model = model
        self.free_bits = free_bits
        self.free_bits_per = free_bits_per
        self.charged = _charged_layers(kl_layers, model.config.num_latent_layers)
        self.bag_of_words_weight = bag_of_words
        self.bag_of_words = BagOfWords(model.config) if bag_of_words else None

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
        noise: Float[Tensor, "batch layers latent"],
        document_weight: Float[Tensor, " batch"],
        beta: float,
        condition_ids: Int[Tensor, "batch source"] | None = None,
        condition_mask: Int[Tensor, "batch source"] | Bool[Tensor, "batch source"] | None = None,
        decoder_input_ids: Int[Tensor, "batch time"] | None = None,
        batch_kl: Float[Tensor, ""] | None = None,
        only_kl: bool = False,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss, and detached sums over the documents of weight > 0 (nats, counts).

        `bag_of_words_nll` is among them where there is a bag of words, without its weight.

        Args:
            batch_kl: where the free bits are the batch's and these documents are a part of one:
                the mean of the charged KL over all of it. None: they are all of it.
            only_kl: leave the decoder out, and give the sum of the charged KL and
                `num_documents`, of which `batch_kl` is made.
        """
        condition = None
        if condition_ids is not None and condition_mask is not None:
            condition = Condition(condition_ids, condition_mask)
        counted = document_weight > 0
        if only_kl:
            sample = self.model.infer(input_ids, attention_mask, noise, condition)
            kl = (self._plain_kl(sample.kl_per_layer) * counted).sum()
            return kl, {"charged_kl": kl.detach(), "num_documents": counted.sum()}
        terms = self.model.elbo_terms(
            input_ids, attention_mask, noise, condition, decoder_input_ids
        )
        charged_kl = self._charged_kl(terms, document_weight, batch_kl)
        document_loss = terms.reconstruction_nll + beta * charged_kl
        sums = _sums(terms, counted)
        if self.bag_of_words is not None:
            bow_nll = self.bag_of_words(self.model, input_ids, attention_mask, terms.sample.latents)
            document_loss = document_loss + self.bag_of_words_weight * bow_nll
            sums["bag_of_words_nll"] = (bow_nll.detach() * counted).sum()
        loss = (document_weight * document_loss).sum()
        return loss, {"loss": loss.detach(), **sums}

    def _plain_kl(self, kl_per_layer: Float[Tensor, "batch layers"]) -> Float[Tensor, " batch"]:
        """Σ_l KL_l over the charged layers."""
        return kl_per_layer[:, self.charged].sum(-1)

    def _charged_kl(
        self,
        terms: ElboTerms,
        document_weight: Float[Tensor, " batch"],
        batch_kl: Float[Tensor, ""] | None,
    ) -> Float[Tensor, " batch"]:
        """Σ_l max(KL_l, λ), Σ_l Σ_i max(KL_li, λ) or max(Σ_l KL_l, λ), over the charged layers.

        For a batch's, Σ_l KL_l where its mean is above λ, else λ: their mean is the greater of
        the two, with its gradient. In evaluation, whose batches are no training's, all is charged.
        """
        if self.free_bits_per == "batch":
            kl = self._plain_kl(terms.kl_per_layer)
            if not self.training:
                return kl
            if batch_kl is None:
                batch_kl = (document_weight * kl.detach()).sum() / document_weight.sum()
            return torch.where(batch_kl > self.free_bits, kl, self.free_bits)
        if self.free_bits_per == "document":
            return self._plain_kl(terms.kl_per_layer).clamp(min=self.free_bits)
        if self.free_bits_per == "dimension":
            kl_per_layer = terms.sample.kl_per_dimension.clamp(min=self.free_bits).sum(-1)
        else:
            kl_per_layer = terms.kl_per_layer.clamp(min=self.free_bits)
        return self._plain_kl(kl_per_layer)


def _charged_layers(asked: Sequence[int] | None, count: int) -> list[int]:
    if asked is None:
        return list(range(count))
    for layer in asked:
        if not -count <= layer < count:
            raise ConfigError(
                f"kl_layers: expected latents from 0 to {count - 1}, or −1 to −{count} from the "
                f"last, got {layer}: the model has {count}; leave kl_layers out to charge all."
            )
    return sorted({layer % count for layer in asked})


@torch.no_grad()
def _sums(terms: ElboTerms, counted: Bool[Tensor, " batch"]) -> dict[str, Tensor]:
    kl_per_layer = (terms.kl_per_layer * counted.unsqueeze(-1)).sum(0)
    return {
        "reconstruction_nll": (terms.reconstruction_nll * counted).sum(),
        "kl": kl_per_layer.sum(),
        "kl_per_layer": kl_per_layer,
        "num_documents": counted.sum(),
        "num_tokens": (terms.num_predicted * counted).sum(),
    }
