"""The aggregate posterior and the mutual information that follows from it."""

import math

import pytest
import torch

from della_model import log_aggregate_posterior
from della_model.gaussian import bounded_log_scale
from della_model.latents import LatentChain


def terms(loc, log_scale):
    """Parameters `[μ; raw log σ]` whose bounded log-scale is `log_scale`, [documents, 1, 2p]."""
    raw = 5 * torch.atanh(log_scale / 5)
    return torch.cat([loc, raw], dim=-1)[:, None]


@pytest.fixture
def chain():
    """Two layers, every matrix random: the second posterior depends on the first latent."""
    chain = LatentChain(2, 3, 7).double()
    for parameter in chain.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return chain


def mutual_information(feature_terms, latent_terms, latents, log_posterior):
    aggregate = log_aggregate_posterior(feature_terms, latent_terms, latents)
    return (log_posterior - aggregate).mean().item()


def test_terms_of_pairs_give_the_chains_own_posteriors(chain):
    features, latents = torch.randn(5, 2, 7).double(), torch.randn(11, 2, 3).double()
    expected = chain.log_posterior(features[:, None], latents[None]).sum(-1)  # [5, 11]
    of_features = chain.posterior_terms_of_features(features)[:, None]
    raw = of_features + chain.posterior_terms_of_latents(latents)[None]
    loc, raw_log_scale = raw.chunk(2, dim=-1)
    found = torch.distributions.Normal(loc, bounded_log_scale(raw_log_scale).exp())
    torch.testing.assert_close(found.log_prob(latents).sum((-1, -2)), expected)


def test_log_aggregate_equals_the_mean_over_all_chains(chain):
    features, latents = torch.randn(301, 2, 7).double(), torch.randn(13, 2, 3).double()
    pairs = chain.log_posterior(features[:, None], latents[None]).sum(-1)
    found = log_aggregate_posterior(
        chain.posterior_terms_of_features(features),
        chain.posterior_terms_of_latents(latents),
        latents,
    )
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, pairs.logsumexp(0) - math.log(301))


def test_mutual_information_of_gaussians_equals_the_closed_form():
    """x ~ N(0, s²), z | x ~ N(x, σ²): the aggregate is N(0, s² + σ²), MI = ½ log(1 + s²/σ²)."""
    s, sigma, count = 1.5, 0.8, 6000
    x = s * torch.randn(count, 1, dtype=torch.float64)
    z = x + sigma * torch.randn(count, 1, dtype=torch.float64)
    log_sigma = torch.full_like(x, math.log(sigma))
    log_posterior = torch.distributions.Normal(x, sigma).log_prob(z).squeeze(-1)
    zeros = torch.zeros(count, 1, 2, dtype=torch.float64)
    found = mutual_information(terms(x, log_sigma), zeros, z[:, None], log_posterior)
    assert found == pytest.approx(0.5 * math.log(1 + (s / sigma) ** 2), abs=0.03)


def test_mutual_information_of_a_two_layer_chain_equals_monte_carlo(chain):
    """Against fresh draws from q(x, z), the aggregate by `torch.distributions`, one pair a time."""
    features = torch.randn(40, 2, 7).double()
    sample = chain.infer(features, torch.randn(300, 40, 2, 3).double())
    found = mutual_information(
        chain.posterior_terms_of_features(features),
        chain.posterior_terms_of_latents(sample.latents.flatten(0, 1)),
        sample.latents.flatten(0, 1),
        sample.log_posterior.sum(-1).flatten(),
    )
    values = []
    for draw in range(1500):
        document = draw % 40
        first = chain._posterior(0, features[:, 0], None)  # of all documents
        z0 = torch.distributions.Normal(first.loc[document], first.scale[document]).sample()
        second = chain._posterior(1, features[:, 1], chain._next_summary(1, None, z0))
        z1 = torch.distributions.Normal(second.loc[document], second.scale[document]).sample()
        logs = sum(
            torch.distributions.Normal(q.loc, q.scale).log_prob(z).sum(-1)
            for q, z in ((first, z0), (second, z1))
        )
        values.append((logs[document] - logs.logsumexp(0) + math.log(40)).item())
    expected, error = torch.tensor(values).mean().item(), torch.tensor(values).std() / 1500**0.5
    assert abs(found - expected) < 4 * error
    assert found < math.log(40)


def test_mutual_information_of_posteriors_far_apart_is_log_n():
    loc = 100.0 * torch.arange(17, dtype=torch.float64)[:, None]
    zeros = torch.zeros(17, 1, 2, dtype=torch.float64)
    log_posterior = torch.distributions.Normal(loc, 1.0).log_prob(loc).squeeze(-1)
    found = mutual_information(
        terms(loc, torch.zeros_like(loc)), zeros, loc[:, None], log_posterior
    )
    assert found == pytest.approx(math.log(17), rel=1e-12)


def test_mutual_information_of_equal_posteriors_is_zero():
    z = torch.randn(17, 1, 2, dtype=torch.float64)
    zeros = torch.zeros(17, 1, 4, dtype=torch.float64)
    log_posterior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((-1, -2))
    assert mutual_information(zeros, zeros, z, log_posterior) == pytest.approx(0, abs=1e-12)
