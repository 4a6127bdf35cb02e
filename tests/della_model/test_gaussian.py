import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from della_model import DiagonalGaussian
from della_model.gaussian import LOG_SCALE_BOUND, bounded_log_scale


def gaussian(*shape, dtype=torch.float64):
    return DiagonalGaussian(
        torch.randn(*shape, dtype=dtype), 0.7 * torch.randn(*shape, dtype=dtype)
    )


def reference(ours):
    return Independent(Normal(ours.loc, ours.scale), 1)


def test_gaussian_log_prob_equals_torch_distributions():
    ours, value = gaussian(3, 5), torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(ours.log_prob(value), reference(ours).log_prob(value))


def test_gaussian_log_prob_broadcasts_over_draws():
    ours, value = gaussian(3, 5), torch.randn(7, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(ours.log_prob(value), reference(ours).log_prob(value))


def test_gaussian_kl_equals_torch_distributions():
    q, p = gaussian(3, 5), gaussian(3, 5)
    torch.testing.assert_close(q.kl_divergence(p), kl_divergence(reference(q), reference(p)))


def test_gaussian_kl_equals_monte_carlo():
    q, p = gaussian(5), gaussian(5)
    z = q.rsample(torch.randn(200_003, 5, dtype=torch.float64))
    log_ratio = q.log_prob(z) - p.log_prob(z)
    standard_error = log_ratio.std() / len(z) ** 0.5
    assert abs(log_ratio.mean() - q.kl_divergence(p)) < 4 * standard_error


def test_gaussian_kl_of_nearly_equal_gaussians_is_exact_in_float32():
    q, p = gaussian(3, 5, dtype=torch.float32), None
    p = DiagonalGaussian(q.loc + 1e-4 * q.scale, q.log_scale + 1e-4)
    exact = kl_divergence(
        Independent(Normal(q.loc.double(), q.log_scale.double().exp()), 1),
        Independent(Normal(p.loc.double(), p.log_scale.double().exp()), 1),
    )
    assert (q.kl_divergence(p) >= 0).all()
    torch.testing.assert_close(q.kl_divergence(p).double(), exact, rtol=0.02, atol=0)


def test_gaussian_rsample_has_its_moments():
    ours = gaussian(5)
    z = ours.rsample(torch.randn(100_003, 5, dtype=torch.float64))
    torch.testing.assert_close(z.mean(0), ours.loc, atol=0.04, rtol=0)
    torch.testing.assert_close(z.std(0), ours.scale, atol=0, rtol=0.02)


def test_gaussian_standard_is_the_unit_gaussian():
    value = torch.randn(3, 5)
    ours = DiagonalGaussian.standard(3, 5)
    expected = Independent(Normal(torch.zeros(3, 5), torch.ones(3, 5)), 1).log_prob(value)
    torch.testing.assert_close(ours.log_prob(value), expected)


def test_gaussian_from_bfloat16_head_computes_in_float32():
    ours = DiagonalGaussian.from_raw(torch.randn(3, 10, dtype=torch.bfloat16))
    assert ours.loc.dtype == ours.scale.dtype == torch.float32
    assert ours.loc.shape == (3, 5)


@pytest.mark.parametrize("raw", [-31.0, -3.0, 0.0, 3.0, 31.0])
def test_log_scale_far_out_stays_bounded_with_a_gradient(raw):
    x = torch.tensor([raw], dtype=torch.float64, requires_grad=True)
    bounded = bounded_log_scale(x)
    bounded.backward()
    assert bounded.abs() < LOG_SCALE_BOUND
    assert x.grad > 0
