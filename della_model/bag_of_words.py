"""A training aid: a document's tokens, whatever their order, predicted from its latents alone."""

from __future__ import annotations

from torch import Tensor, nn

from della_model.config import DellaConfig
from della_model.errors import ConfigError
from della_model.gaussian import at_least_float32
from della_model.model import Della, predicted_tokens
from della_model.shapes import Bool, Float, Int


class BagOfWords(nn.Module):
    """−Σ_t log softmax(W_head tanh(W [z_1; …; z_L] + b))[x_t], over a document's predicted tokens.

    The multiset of its tokens under one distribution that the latents give, in nats (Zhao et al.
    2017). A decoder can ignore z, for it reads the tokens before; here there is z alone. The
    vocabulary's matrix is the model's own head; W and b are all that is added.
    """

    def __init__(self, config: DellaConfig) -> None:
        super().__init__()
        if not config.num_latent_layers:
            raise ConfigError(
                "bag_of_words: expected 0 for a model without latents: there is nothing to predict "
                "from; leave it out, or choose other latents than 'none'."
            )
        size = config.num_latent_layers * config.latent_size
        self.latents_to_hidden = nn.Linear(size, config.backbone.hidden_size)

    def forward(
        self,
        model: Della,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"],
        latents: Float[Tensor, "batch layers latent"],
    ) -> Float[Tensor, " batch"]:
        """Nats a document, summed over its tokens."""
        weight = self.latents_to_hidden.weight
        hidden = self.latents_to_hidden(latents.flatten(1).to(weight.dtype)).tanh()
        # One distribution a document, not one a token: [B, V] is small beside a batch's logits.
        log_probabilities = at_least_float32(model.head(hidden)).log_softmax(-1)
        token_nll = -log_probabilities.gather(1, input_ids)
        return (token_nll * predicted_tokens(attention_mask.bool())).sum(-1)
