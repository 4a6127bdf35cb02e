import pytest
import torch

from della_model import FUSIONS, LowRankTensorFusion
from della_model.fusion import ProductFusion, Shift, ValueShift

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


@pytest.mark.parametrize("residual", [True, False])
def test_low_rank_fusion_folded_gives_the_same_values_for_all_rows_of_a_document(residual):
    fusion = LowRankTensorFusion(VALUE, LATENT, RANK, residual).double()
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter)
    v = torch.randn(3 * BATCH, TIME, VALUE, dtype=torch.float64)  # three rows a document
    z = torch.randn(BATCH, LATENT, dtype=torch.float64)
    repeated = z.repeat_interleave(3, dim=0)
    expected = fusion(v, repeated)
    fusion.folded = fusion.fold(z)
    torch.testing.assert_close(fusion(v, repeated), expected)


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


VALUE_FUSIONS = {name: entry.values for name, entry in FUSIONS.items() if entry.values is not None}


@pytest.mark.parametrize("name", VALUE_FUSIONS)
def test_value_fusion_residual_starts_as_the_identity_whatever_the_latent(name):
    fusion = VALUE_FUSIONS[name](VALUE, LATENT, RANK, True)
    v = torch.randn(BATCH, TIME, VALUE)
    assert torch.equal(fusion(v, torch.randn(BATCH, LATENT)), v)


def test_product_fusion_equals_the_papers_equation_with_ranks_summed_first():
    """(Σ_r W_v^r v) ∘ (Σ_r W_z^r z), the ranks as the paper has them, each a share of the sum."""
    fusion = ProductFusion(VALUE, LATENT, RANK, residual=False).double()
    v = torch.randn(BATCH, TIME, VALUE, dtype=torch.float64)
    z = torch.randn(BATCH, LATENT, dtype=torch.float64)

    def ranks_of(whole):
        parts = torch.randn(RANK - 1, *whole.shape, dtype=torch.float64)
        return [*parts, whole - parts.sum(0)]

    value_ranks = ranks_of(fusion.value_factor.weight)
    latent_ranks = ranks_of(fusion.latent_factor.weight)
    expected = sum(v @ w.T for w in value_ranks) * sum(z @ w.T for w in latent_ranks)[:, None]
    torch.testing.assert_close(fusion(v, z), expected)
    fusion.residual = True
    torch.testing.assert_close(fusion(v, z), v + expected)


def test_value_shift_adds_the_same_vector_everywhere_in_a_document():
    fusion = ValueShift(VALUE, LATENT, RANK)
    torch.nn.init.normal_(fusion.latent_to_value.weight)
    v, z = torch.randn(BATCH, TIME, VALUE), torch.randn(BATCH, LATENT)
    for b in range(BATCH):
        expected = v[b] + fusion.latent_to_value.weight @ z[b]
        torch.testing.assert_close(fusion(v, z)[b], expected)


def test_shift_is_a_sum_over_layers():
    shift = Shift(3, LATENT, VALUE)
    torch.nn.init.normal_(shift.latents_to_hidden.weight)
    states, latents = torch.randn(BATCH, TIME, VALUE), torch.randn(BATCH, 3, LATENT)
    maps = shift.latents_to_hidden.weight.split(LATENT, dim=1)
    for b in range(BATCH):
        added = sum(w @ z for w, z in zip(maps, latents[b], strict=True))
        torch.testing.assert_close(shift(states, latents)[b], states[b] + added)
