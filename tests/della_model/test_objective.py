import pytest
import torch

from della_model import ConfigError, Objective

BETA, FREE_BITS = 0.7, 3.0


@pytest.fixture
def noise(make_model):
    return make_model().draw_noise(5).double()


def test_objective_loss_equals_a_plain_computation(make_model, batch, noise):
    model = make_model().double()
    weight = torch.tensor([0.1, 0.2, 0.3, 0.05, 0.35]).double()
    loss, _ = Objective(model, FREE_BITS)(*batch, noise, weight, BETA)
    terms = model.elbo_terms(*batch, noise)
    assert (terms.kl_per_layer < FREE_BITS).any(), "free bits should bind somewhere"
    assert (terms.kl_per_layer > FREE_BITS).any(), "and not everywhere"
    expected = 0.0
    for document in range(5):
        charged = sum(max(kl.item(), FREE_BITS) for kl in terms.kl_per_layer[document])
        nll = terms.reconstruction_nll[document].item()
        expected += float(weight[document]) * (nll + BETA * charged)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_objective_reports_the_true_kl_whatever_beta_and_free_bits(make_model, batch, noise):
    model = make_model().double()
    weight = torch.full((5,), 0.2).double()
    _, plain = Objective(model)(*batch, noise, weight, 1.0)
    _, aided = Objective(model, 100.0)(*batch, noise, weight, 0.0)
    for name in ("kl", "kl_per_layer", "reconstruction_nll"):
        assert torch.equal(plain[name], aided[name])
    terms = model.elbo_terms(*batch, noise)
    torch.testing.assert_close(plain["kl_per_layer"], terms.kl_per_layer.sum(0))
    torch.testing.assert_close(plain["kl"], terms.kl.sum())
    assert (plain["num_documents"], plain["num_tokens"]) == (5, 28)
    assert not any(value.requires_grad for value in plain.values())


def test_objective_below_free_bits_has_no_kl_gradient(make_model, batch, noise):
    model = make_model().double()
    weight = torch.full((5,), 0.2).double()

    def gradient(free_bits, beta):
        model.zero_grad()
        Objective(model, free_bits)(*batch, noise, weight, beta)[0].backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for one, other in zip(gradient(1e3, 1.0), gradient(0.0, 0.0), strict=False):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("pieces", [[1, 4], [2, 2, 1], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("side", ["right", "left"])
def test_objective_of_a_global_batch_does_not_depend_on_its_division(
    make_model, documents, pad_documents, noise, pieces, side
):
    """Each piece is padded for itself, some with fillers of weight 0; losses and gradients add."""
    objective = Objective(make_model().double(), FREE_BITS)
    whole, sums = objective(*pad_documents(documents), noise, torch.full((5,), 0.2).double(), BETA)
    expected = torch.autograd.grad(whole, list(objective.parameters()))

    total, gradients, added = 0.0, [torch.zeros_like(g) for g in expected], {}
    start = 0
    for size in pieces:
        rows = slice(start, start + size)
        start += size
        filler = [[1, 8, 9, 10, 2]] if size == 1 else []
        part = pad_documents(documents[rows] + filler, side)
        weight = torch.tensor([0.2] * size + [0.0] * len(filler)).double()
        part_noise = torch.cat([noise[rows], torch.randn(len(filler), *noise.shape[1:]).double()])
        loss, part_sums = objective(*part, part_noise, weight, BETA)
        total += loss
        for g, piece in zip(
            gradients, torch.autograd.grad(loss, list(objective.parameters())), strict=True
        ):
            g += piece
        added = {name: added.get(name, 0) + value for name, value in part_sums.items()}

    torch.testing.assert_close(total, whole)
    for name, value in sums.items():
        torch.testing.assert_close(added[name], value, msg=name)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("free_bits", [-0.1, float("nan"), float("inf")])
def test_objective_with_bad_free_bits_says_so(make_model, free_bits):
    with pytest.raises(ConfigError, match="free_bits: expected"):
        Objective(make_model(), free_bits)


def test_objective_training_lowers_the_loss_and_the_latents_come_alive(make_model, batch):
    """A decoder that ignored z could not tell five documents apart after BOS."""
    model = make_model().train()
    objective = Objective(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    weight, losses = torch.full((5,), 0.2), []
    for _ in range(60):
        loss, sums = objective(*batch, model.draw_noise(5), weight, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert sums["kl"] > 0.1
