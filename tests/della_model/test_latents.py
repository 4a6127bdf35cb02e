import pytest
import torch
from torch.distributions import Independent, Normal

from della_model.gaussian import LOG_SCALE_BOUND
from della_model.latents import LatentChain

NUM_LAYERS, LATENT, FEATURES, BATCH = 5, 3, 7, 11


@pytest.fixture
def chain():
    chain = LatentChain(NUM_LAYERS, LATENT, FEATURES).double()
    for parameter in chain.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return chain


@pytest.fixture
def features():
    return torch.randn(BATCH, NUM_LAYERS, FEATURES, dtype=torch.float64)


@pytest.fixture
def noise():
    return torch.randn(BATCH, NUM_LAYERS, LATENT, dtype=torch.float64)


def normal(raw):
    loc, log_scale = raw[:LATENT], LOG_SCALE_BOUND * torch.tanh(raw[LATENT:] / LOG_SCALE_BOUND)
    return Independent(Normal(loc, log_scale.exp()), 1)


def walk(chain, x, choose):
    """One document, layer by layer, straight from the equations; h and z start at zero."""
    h = z = torch.zeros(LATENT, dtype=torch.float64)
    steps = []
    for layer in range(NUM_LAYERS):
        w_hh = (
            chain.summary_to_summary[layer - 2].weight if layer >= 2 else torch.zeros(3, 3).double()
        )
        w_ih = (
            chain.latent_to_summary[layer - 1].weight if layer >= 1 else torch.zeros(3, 3).double()
        )
        h = torch.tanh(w_hh @ h + w_ih @ z)
        head = chain.posterior_from_features[layer]
        weight, features = head.weight, x[layer]
        if layer >= 1:
            weight = torch.cat([chain.posterior_from_summary[layer - 1].weight, weight], dim=1)
            features = torch.cat([h, features])
        q = normal(weight @ features + head.bias)
        p = Independent(Normal(torch.zeros_like(h), torch.ones_like(h)), 1)
        if layer >= 1:
            p = normal(chain.prior_heads[layer - 1].weight @ h + chain.prior_heads[layer - 1].bias)
        z = choose(layer, q, p)
        steps.append((z, q, p))
    return steps


def test_chain_infer_equals_a_plain_loop(chain, features, noise):
    sample = chain.infer(features, noise)
    for n in range(BATCH):
        steps = walk(chain, features[n], lambda at, q, _, n=n: q.mean + q.stddev * noise[n, at])
        for layer, (z, q, p) in enumerate(steps):
            torch.testing.assert_close(sample.latents[n, layer], z)
            kl = torch.distributions.kl_divergence(q, p)
            torch.testing.assert_close(sample.kl_per_layer[n, layer], kl)
            torch.testing.assert_close(sample.log_posterior[n, layer], q.log_prob(z))
            torch.testing.assert_close(sample.log_prior[n, layer], p.log_prob(z))


def test_chain_sample_prior_equals_a_plain_loop(chain, features, noise):
    latents = chain.sample_prior(noise)
    for n in range(BATCH):
        steps = walk(chain, features[n], lambda at, _, p, n=n: p.mean + p.stddev * noise[n, at])
        torch.testing.assert_close(latents[n], torch.stack([z for z, _, _ in steps]))


def test_chain_densities_of_given_latents_equal_a_plain_loop(chain, features):
    latents = torch.randn(13, NUM_LAYERS, LATENT, dtype=torch.float64)
    log_prior = chain.log_prior(latents)
    log_posterior = chain.log_posterior(features.unsqueeze(1), latents.unsqueeze(0))
    assert log_posterior.shape == (BATCH, 13, NUM_LAYERS)
    for n in (0, 4, BATCH - 1):
        for m in (0, 5, 12):
            steps = walk(chain, features[n], lambda at, *_, m=m: latents[m, at])
            expected_q = torch.stack([q.log_prob(z) for z, q, _ in steps])
            expected_p = torch.stack([p.log_prob(z) for z, _, p in steps])
            torch.testing.assert_close(log_posterior[n, m], expected_q)
            torch.testing.assert_close(log_prior[m], expected_p)


def test_chain_infer_with_draws_equals_one_draw_at_a_time(chain, features):
    noise = torch.randn(2, BATCH, NUM_LAYERS, LATENT, dtype=torch.float64)
    together = chain.infer(features, noise)
    for k in range(2):
        alone = chain.infer(features, noise[k])
        torch.testing.assert_close(together.latents[k], alone.latents)
        torch.testing.assert_close(together.kl_per_layer[k], alone.kl_per_layer)
        torch.testing.assert_close(together.log_prior[k], alone.log_prior)


def test_chain_one_layer_has_the_unit_gaussian_as_prior():
    chain = LatentChain(1, LATENT, FEATURES)
    latents = torch.randn(BATCH, 1, LATENT)
    expected = Normal(torch.zeros(LATENT), torch.ones(LATENT)).log_prob(latents).sum(-1)
    torch.testing.assert_close(chain.log_prior(latents), expected)


def test_chain_fresh_starts_near_the_prior_but_alive():
    chain = LatentChain(NUM_LAYERS, 31, 64)
    features = torch.nn.functional.layer_norm(torch.randn(101, NUM_LAYERS, 64), (64,))
    sample = chain.infer(features, torch.randn(101, NUM_LAYERS, 31))
    kl_per_dimension = sample.kl_per_layer.mean() / 31
    assert 0.005 < kl_per_dimension < 0.05
    sample.kl_per_layer.sum().backward()
    assert all(p.grad is not None for p in chain.parameters())


def test_kl_per_dimension_equals_torchs_and_sums_to_the_layers(chain, features, noise):
    sample = chain.infer(features, noise)
    for layer, (q, p) in enumerate(zip(sample.posteriors, sample.priors, strict=True)):
        expected = torch.distributions.kl_divergence(Normal(q.loc, q.scale), Normal(p.loc, p.scale))
        torch.testing.assert_close(sample.kl_per_dimension[:, layer], expected)
    torch.testing.assert_close(sample.kl_per_dimension.sum(-1), sample.kl_per_layer)
