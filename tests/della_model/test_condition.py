"""Documents generated from sources: the equations, and that a source is never scored."""

import copy
import math

import pytest
import torch

from della_model import Condition, Della, DellaConfig, InputError, Objective, iw_nll
from tests.della_model.backbone_data import BOS, EOS, FAMILIES
from tests.della_model.conftest import pad, randomize

SOURCES = [[BOS, 3, 14, EOS], [BOS, 15, 9, 26, 5, EOS], [BOS, 35, EOS], [BOS, 8, 9, EOS],
           [BOS, 7, 7, 9, 32, 38, 46, EOS]]  # fmt: skip
families = pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])


@pytest.fixture
def model(family):
    torch.manual_seed(5)
    backbone = copy.deepcopy(FAMILIES[family])
    config = DellaConfig(backbone=backbone, latent_size=5, fusion_rank=3, conditional=True)
    return randomize(Della(config)).double().eval()


@pytest.fixture
def condition():
    return Condition(*pad(SOURCES))


def noise_for(model, *leading):
    return model.draw_noise(*leading, 5, generator=torch.Generator().manual_seed(3)).double()


def gaussian(raw):
    loc, raw_scale = raw.chunk(2)
    return loc, 5 * torch.tanh(raw_scale / 5)


@torch.no_grad()
def plain_terms(model, source, document, noise):
    """KL of each layer, and −log p of each target token, one token and one layer at a time."""
    chain, ones = model.chain, torch.ones_like
    source, document = torch.tensor([source]), torch.tensor([document])
    reading = model.read(Condition(source, ones(source)))
    x = model.features(document, ones(document), reading)[0]
    c, h, z, kl = reading.features[0], torch.zeros(5).double(), [], []
    for layer in range(3):
        raw_p = chain.prior_from_condition[layer](c[layer])
        raw_q = chain.posterior_from_features[layer](x[layer])
        if layer > 0:
            h_in = chain.latent_to_summary[layer - 1](z[-1])
            if layer > 1:
                h_in = h_in + chain.summary_to_summary[layer - 2](h)
            h = torch.tanh(h_in)
            raw_p = raw_p + chain.prior_heads[layer - 1](h)
            raw_q = raw_q + chain.posterior_from_summary[layer - 1](h)
        (p, log_p), (q, log_q) = gaussian(raw_p), gaussian(raw_q)
        z.append(q + log_q.exp() * noise[layer])
        variance = (2 * (log_q - log_p)).exp()
        kl.append(log_p - log_q + (variance + ((q - p) / log_p.exp()) ** 2) / 2 - 0.5)
    latents, nll = torch.stack(z)[None], []
    for t in range(1, document.shape[1]):
        before = document[:, :t]
        if reading.states is None:
            tokens = {"input_ids": torch.cat([source, before], dim=1)}
        else:
            states = model.backbone.model.encoder(input_ids=source).last_hidden_state
            tokens = {"input_ids": before, "encoder_hidden_states": states}
        hidden = model.trunk(**tokens, latents=latents).last_hidden_state[0, -1]
        nll.append(-(model.head.weight @ hidden).log_softmax(-1)[document[0, t]])
    return torch.stack(kl).sum(-1), torch.stack(nll)


@families
def test_condition_elbo_equals_a_plain_loop_over_target_tokens_alone(model, condition, documents):
    noise = noise_for(model)
    terms = model.elbo_terms(*pad(documents), noise, condition)
    for row, (source, document) in enumerate(zip(SOURCES, documents, strict=True)):
        kl, nll = plain_terms(model, source, document, noise[row])
        torch.testing.assert_close(terms.kl_per_layer[row], kl)
        torch.testing.assert_close(terms.reconstruction_nll[row], nll.sum())
        assert terms.num_predicted[row] == len(nll) == len(document) - 1


@families
def test_condition_objective_takes_it_as_tensors(model, condition, documents):
    weight, noise = torch.linspace(0.1, 0.5, 5).double(), noise_for(model)
    batch = pad(documents)
    loss, sums = Objective(model, free_bits=0.0)(
        *batch, noise, weight, 0.3, condition_ids=condition[0], condition_mask=condition[1]
    )
    terms = model.elbo_terms(*batch, noise, condition)
    torch.testing.assert_close(loss, (weight * (terms.reconstruction_nll + 0.3 * terms.kl)).sum())
    assert sums["num_tokens"] == sum(len(document) - 1 for document in documents)


@families
def test_condition_decides_priors_posteriors_and_tokens(model, condition, documents):
    noise, other = noise_for(model), condition._replace(input_ids=condition.input_ids.flip(0))
    batch = pad(documents)
    first, second = (model.elbo_terms(*batch, noise, c) for c in (condition, other))
    for name in ("priors", "posteriors"):
        one, two = (getattr(terms.sample, name)[0].loc for terms in (first, second))
        assert not torch.allclose(one[0], two[0], atol=1e-3)
    latents = model.sample_prior(noise=noise, condition=condition)
    one, two = (model.reconstruction_nll(*batch, latents, c) for c in (condition, other))
    assert not torch.allclose(one[0], two[0], atol=1e-3)


@families
def test_condition_says_nothing_of_latents_at_the_start(family, condition):
    config = DellaConfig(backbone=copy.deepcopy(FAMILIES[family]), conditional=True)
    model = Della(config)
    noise = model.draw_noise(5)
    torch.testing.assert_close(model.sample_prior(noise=noise, condition=condition), noise)


@families
def test_condition_importance_weighted_bound_equals_the_definition(model, condition, documents):
    batch, noise = pad(documents), noise_for(model, 4)
    found = iw_nll(model, *batch, noise, chunk_size=3, condition=condition)
    weights = []
    for one in noise:
        terms = model.elbo_terms(*batch, one, condition)
        ratio = (terms.sample.log_prior - terms.sample.log_posterior).sum(-1)
        weights.append(ratio - terms.reconstruction_nll)
    expected = math.log(4) - torch.stack(weights).logsumexp(0)
    torch.testing.assert_close(found, expected)


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_condition_generation_equals_a_plain_loop_whatever_its_padding(model, side):
    condition = Condition(*pad(SOURCES, side))
    latents = model.sample_prior(noise=noise_for(model), condition=condition)
    found = model.generate(
        latents=latents, condition=condition, max_new_tokens=5, do_sample=False,
        eos_token_id=[], pad_token_id=EOS,
    )  # fmt: skip
    ids = torch.full((5, 1), BOS)
    for _ in range(5):
        logits = model(ids, latents=latents, condition=condition).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids)


def test_condition_beams_and_several_sequences_keep_their_source():
    torch.manual_seed(5)
    config = DellaConfig(backbone=copy.deepcopy(FAMILIES["bart"]), latent_size=5, conditional=True)
    model = randomize(Della(config)).eval()
    condition = Condition(*pad(SOURCES))
    options = {"num_beams": 4, "max_new_tokens": 6}
    best = model.generate(condition=condition, noise=noise_for(model).float(), **options)
    several = model.generate(
        condition=condition, noise=noise_for(model).float(), num_return_sequences=3, **options
    )
    width = min(best.shape[1], several.shape[1])
    assert torch.equal(several[::3, :width], best[:, :width])


@pytest.mark.parametrize(
    ("is_conditional", "call", "message"),
    [
        (True, lambda m, b, _: m.elbo_terms(*b, m.draw_noise(5)), "a condition .* got none"),
        (True, lambda m, *_: m.generate(num_documents=2), "expected a condition"),
        (False, lambda m, b, c: m.elbo_terms(*b, m.draw_noise(5), c), "expected no condition"),
        (
            True,
            lambda m, b, _: m.elbo_terms(*b, m.draw_noise(5), Condition(*pad(SOURCES, to=19))),
            "at most 29 positions for a source and its document, got 30",
        ),
        (
            True,
            lambda m, _, c: m.generate(condition=c, max_new_tokens=22),
            "max_new_tokens: expected at most 21, got 22",
        ),
    ],
)  # fmt: skip
def test_condition_missing_or_too_long_says_so(is_conditional, call, message, documents):
    backbone = copy.deepcopy(FAMILIES["gpt2"])
    model = Della(DellaConfig(backbone=backbone, latent_size=5, conditional=is_conditional))
    with pytest.raises(InputError, match=message):
        call(model, pad(documents), Condition(*pad(SOURCES)))
