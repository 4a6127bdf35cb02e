import math

import pytest
import torch

from della_model import importance_samples, iw_log_weights, iw_nll, iw_nll_of_weights


@pytest.fixture
def one_dimensional(make_model):
    """One latent layer of size one, which matters: log p(x | z) varies by nats over z."""
    return make_model(latent_size=1, latent_layers=[1, 1]).double()


@pytest.fixture
def log_marginal(one_dimensional, batch):
    """log ∫ p(x | z) N(z; 0, 1) dz on a grid, by the trapezium rule."""
    grid = torch.linspace(-9, 9, 901, dtype=torch.float64)
    log_prior = -0.5 * grid.square() - 0.5 * math.log(2 * math.pi)
    marginals = []
    for ids, mask in zip(*batch, strict=True):
        with torch.no_grad():
            nll = one_dimensional.reconstruction_nll(
                ids.expand(901, -1), mask.expand(901, -1), grid[:, None, None]
            )
        assert nll.max() - nll.min() > 0.5
        marginals.append(torch.trapezoid((log_prior - nll).exp(), grid).log())
    return torch.stack(marginals)


def test_iw_nll_equals_numerical_integration_to_1_percent(one_dimensional, batch, log_marginal):
    noise = one_dimensional.draw_noise(2003, 5)
    nll = iw_nll(one_dimensional, *batch, noise, chunk_size=101)
    assert nll.dtype == torch.float64
    torch.testing.assert_close(nll, -log_marginal, rtol=0.01, atol=0)


def test_iw_nll_of_one_draw_is_an_upper_bound_in_expectation(one_dimensional, batch, log_marginal):
    noise = one_dimensional.draw_noise(503, 5)
    log_weights = iw_log_weights(one_dimensional, *batch, noise)
    standard_error = log_weights.std(0) / 503**0.5
    assert (-log_weights.mean(0) > -log_marginal - 4 * standard_error).all()


def test_iw_negative_elbo_equals_the_mean_log_weight(one_dimensional, batch):
    """The closed-form KL and the sampled densities have to tell the same story."""
    noise = one_dimensional.draw_noise(503, 5)
    log_weights = iw_log_weights(one_dimensional, *batch, noise, chunk_size=101)
    sample = one_dimensional.infer(*batch, noise)
    log_likelihood = log_weights - (sample.log_prior - sample.log_posterior).sum(-1)
    closed = (sample.kl_per_layer.sum(-1) - log_likelihood).mean(0)
    torch.testing.assert_close(-log_weights.mean(0), closed, rtol=0.03, atol=0.05)


def test_iw_log_weights_equal_their_definition(make_model, batch):
    model = make_model().double()
    noise = model.draw_noise(7, 5)
    log_weights = iw_log_weights(model, *batch, noise, chunk_size=3)
    assert log_weights.shape == (7, 5)
    for k in range(7):
        sample = model.infer(*batch, noise[k])
        z, features = sample.latents, model.features(*batch)
        expected = (
            -model.reconstruction_nll(*batch, z)
            + model.chain.log_prior(z).sum(-1)
            - model.chain.log_posterior(features, z).sum(-1)
        )
        torch.testing.assert_close(log_weights[k], expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 100])
def test_iw_nll_does_not_depend_on_chunks(make_model, batch, chunk_size):
    model = make_model().double()
    noise = model.draw_noise(7, 5, generator=torch.Generator().manual_seed(1))
    log_weights = iw_log_weights(model, *batch, noise, chunk_size=7)
    expected = -(log_weights.exp().mean(0)).log()
    torch.testing.assert_close(iw_nll(model, *batch, noise, chunk_size), expected)


def test_iw_nll_of_two_layers_equals_numerical_integration(make_model, batch):
    """log ∫∫ p(x | z) p(z_2 | z_1) p(z_1) dz_1 dz_2 on a grid of the plane, by the trapezium."""
    model = make_model(latent_size=1, latent_layers=[1, 2]).double()
    with torch.no_grad():  # a posterior near the prior and wide: its weights vary little
        for head in model.chain.posterior_from_features:
            head.weight.mul_(0.2)
            head.bias.copy_(torch.tensor([0.0, 0.4]))
    axis = torch.linspace(-7, 7, 61, dtype=torch.float64)
    plane = torch.cartesian_prod(axis, axis)[:, :, None]  # [3721, 2, 1]
    log_prior = model.chain.log_prior(plane).sum(-1)
    found = iw_nll(model, *batch, model.draw_noise(4003, 5), chunk_size=101)
    for place, (ids, mask) in enumerate(zip(*batch, strict=True)):
        ids, mask = ids[: mask.sum()], mask[: mask.sum()]
        with torch.no_grad():
            nll = model.reconstruction_nll(
                ids.expand(len(plane), -1), mask.expand(len(plane), -1), plane
            )
        joint = (log_prior - nll).exp().view(61, 61)
        expected = -torch.trapezoid(torch.trapezoid(joint, axis), axis).log()
        torch.testing.assert_close(found[place], expected, rtol=0.01, atol=0)


def test_encoder_runs_once_whatever_the_number_of_draws(make_model, batch, monkeypatch):
    model = make_model()
    passes = []
    features = model.features
    monkeypatch.setattr(model, "features", lambda *a: passes.append(1) or features(*a))
    iw_nll(model, *batch, model.draw_noise(7, 5), chunk_size=2)
    assert len(passes) == 1


def test_log_weights_are_the_sum_of_their_parts(make_model, batch):
    model = make_model().double()
    noise = model.draw_noise(7, 5)
    found = importance_samples(model, *batch, model.features(*batch), noise)
    parts = found.log_ratio_per_layer.sum(-1) - found.reconstruction_nll
    torch.testing.assert_close(iw_log_weights(model, *batch, noise), parts)
    torch.testing.assert_close(found.log_weights, parts)


def test_bound_of_fewer_samples_is_the_mean_over_groups():
    log_weights = torch.randn(17, 3, dtype=torch.float64)
    groups = [-(log_weights[5 * g : 5 * g + 5].exp().mean(0).log()) for g in range(3)]
    torch.testing.assert_close(iw_nll_of_weights(log_weights, 5), torch.stack(groups).mean(0))
    torch.testing.assert_close(iw_nll_of_weights(log_weights, 1), -log_weights.mean(0))
