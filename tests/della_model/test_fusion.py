import pytest
import torch

from della_model import FUSIONS, LowRankTensorFusion

BATCH, TIME, VALUE, LATENT, RANK = 2, 5, 7, 3, 4


@pytest.mark.parametrize("residual", [True, False])
def test_low_rank_fusion_equals_a_plain_loop_over_ranks(residual):
    fusion = LowRankTensorFusion(VALUE, LATENT, RANK, residual).double()
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter)
    v = torch.randn(BATCH, TIME, VALUE, dtype=torch.float64)
    z = torch.randn(BATCH, LATENT, dtype=torch.float64)
    fused = fusion(v, z)
    one = torch.ones(1, dtype=torch.float64)
    for b in range(BATCH):
        for t in range(TIME):
            expected = v[b, t].clone() if residual else torch.zeros(VALUE, dtype=torch.float64)
            for r in range(RANK):
                rows = slice(r * VALUE, (r + 1) * VALUE)
                w_v = torch.cat([fusion.value_factor.weight, fusion.value_factor.bias[:, None]], 1)
                w_z = torch.cat(
                    [fusion.latent_factor.weight, fusion.latent_factor.bias[:, None]], 1
                )
                expected += (w_v[rows] @ torch.cat([v[b, t], one])) * (
                    w_z[rows] @ torch.cat([z[b], one])
                )
            torch.testing.assert_close(fused[b, t], expected)


def test_low_rank_fusion_residual_starts_as_the_identity():
    fusion = LowRankTensorFusion(VALUE, LATENT, RANK, residual=True)
    v = torch.randn(BATCH, TIME, VALUE)
    assert torch.equal(fusion(v, torch.randn(BATCH, LATENT)), v)


def test_low_rank_fusion_residual_learns_from_the_first_step():
    fusion = LowRankTensorFusion(VALUE, LATENT, RANK, residual=True)
    v, z = torch.randn(BATCH, TIME, VALUE), torch.randn(BATCH, LATENT, requires_grad=True)
    optimizer = torch.optim.SGD(fusion.parameters(), lr=0.1)
    target = torch.randn(BATCH, TIME, VALUE)
    (fusion(v, z) - target).square().sum().backward()
    assert fusion.latent_factor.weight.grad.abs().max() > 0
    optimizer.step()
    (fusion(v, z) - target).square().sum().backward()
    assert fusion.value_factor.weight.grad.abs().max() > 0
    assert z.grad.abs().max() > 0


def test_low_rank_fusion_replacement_keeps_the_variance_of_values():
    fusion = LowRankTensorFusion(64, 31, RANK, residual=False)
    fused = fusion(torch.randn(53, 17, 64), torch.randn(53, 31))
    assert 0.7 < fused.var() < 1.4


def test_fusions_registry_builds_each_by_the_same_arguments():
    for make in FUSIONS.values():
        fusion = make(VALUE, LATENT, RANK, True)
        fused = fusion(torch.randn(BATCH, TIME, VALUE), torch.randn(BATCH, LATENT))
        assert fused.shape == (BATCH, TIME, VALUE)
