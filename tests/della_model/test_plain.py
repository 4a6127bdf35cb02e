"""Every variant against a plain implementation: one document, one layer, one head, one token."""

import pytest
import torch

from della_model import Condition
from tests.della_model.plain_gpt2 import plain_elbo

SOURCES = [[1, 3, 14, 2], [1, 15, 9, 26, 5, 2], [1, 35, 2]]
VARIANTS = [
    {},
    {"latents": "none"},
    {"latents": "constant"},
    {"latents": "constant", "fusion": "softmax", "latent_layers": [1, 2]},
    {"latents": "single"},
    {"latents": "independent"},
    {"fusion": "memory"},
    {"fusion": "embed"},
    {"fusion": "softmax"},
    {"latents": "single", "fusion": "embed+memory", "latent_layers": [0, 1]},
    {"encoder": "separate"},
    {"encoder": "separate", "latents": "single", "fusion": "memory"},
    {"conditional": True},
    {"conditional": True, "encoder": "separate"},
    {"conditional": True, "encoder": "separate", "latents": "independent", "fusion": "memory"},
]


def name_of(options):
    return "-".join(k if v is True else str(v) for k, v in options.items()) or "della"


@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_plain_implementation_gives_the_same_elbo(make_model, documents, pad_documents, options):
    model = make_model(**options).double()
    documents = [documents[0], documents[1], documents[3]]
    sources = SOURCES if options.get("conditional") else [None] * 3
    condition = Condition(*pad_documents(SOURCES)) if options.get("conditional") else None
    noise = model.draw_noise(3)
    terms = model.elbo_terms(*pad_documents(documents), noise, condition)
    for row, (document, source) in enumerate(zip(documents, sources, strict=True)):
        kl, nll = plain_elbo(model, document, noise[row], source)
        torch.testing.assert_close(terms.kl_per_layer[row], kl)
        torch.testing.assert_close(terms.reconstruction_nll[row], nll)
