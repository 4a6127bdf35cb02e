import math

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


def test_objective_free_bits_of_each_dimension_equal_a_plain_computation(make_model, batch, noise):
    model = make_model().double()
    weight = torch.tensor([0.1, 0.2, 0.3, 0.05, 0.35]).double()
    free = 0.6
    loss, sums = Objective(model, free, "dimension")(*batch, noise, weight, BETA)
    sample = model.infer(*batch, noise)
    expected = model.reconstruction_nll(*batch, sample.latents)
    for q, p in zip(sample.posteriors, sample.priors, strict=True):
        kl = torch.distributions.kl_divergence(
            torch.distributions.Normal(q.loc, q.scale), torch.distributions.Normal(p.loc, p.scale)
        )
        assert (kl < free).any(), "free bits should bind somewhere"
        assert (kl > free).any(), "and not everywhere"
        expected = expected + BETA * kl.clamp(min=free).sum(-1)
    torch.testing.assert_close(loss, (weight * expected).sum())
    torch.testing.assert_close(sums["kl"], sample.kl_per_layer.sum())


def test_objective_free_bits_of_a_document_are_shared_by_its_layers(make_model, batch, noise):
    model = make_model().double()
    weight = torch.tensor([0.1, 0.2, 0.3, 0.05, 0.35]).double()
    terms = model.elbo_terms(*batch, noise)
    free = float(terms.kl.detach().median())
    assert (terms.kl < free).any(), "free bits should bind somewhere"
    assert (terms.kl > free).any(), "and not everywhere"
    loss, sums = Objective(model, free, "document")(*batch, noise, weight, BETA)
    charged = [max(float(kl), free) for kl in terms.kl.detach()]
    expected = terms.reconstruction_nll + BETA * torch.tensor(charged).double()
    torch.testing.assert_close(loss, (weight * expected).sum())
    torch.testing.assert_close(sums["kl"], terms.kl.sum())
    of_last, _ = Objective(model, free, "document", [-1])(*batch, noise, weight, BETA)
    expected = terms.reconstruction_nll + BETA * terms.kl_per_layer[:, -1].clamp(min=free)
    torch.testing.assert_close(of_last, (weight * expected).sum())


@pytest.mark.parametrize("share", [0.9, 1.1])
@pytest.mark.parametrize("sizes", [[5], [1, 4], [2, 2, 1]])
def test_objective_free_bits_of_a_batch_are_shared_by_its_documents(
    make_model, documents, pad_documents, batch, noise, share, sizes
):
    """Whole or in parts, with fillers: the greater of mean KL and λ, and its gradient."""
    model = make_model().double()
    kl = model.elbo_terms(*batch, noise).kl
    free = share * float(kl.detach().mean())
    assert (kl < free).any(), "some documents take less than their share"
    assert (kl > free).any(), "and some more"
    terms = model.elbo_terms(*batch, noise)
    expected = terms.reconstruction_nll.mean() + BETA * terms.kl.mean().clamp(min=free)
    objective = Objective(model, free, "batch").train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected, parameters, allow_unused=True)

    parts, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        start += size
        part = pad_documents([*documents[rows], [1, 8, 9, 10, 2]])
        filler = torch.randn(1, *noise.shape[1:]).double()
        weight = torch.tensor([0.2] * size + [0.0], dtype=torch.float64)
        parts.append((*part, torch.cat([noise[rows], filler]), weight))
    batch_kl = None
    if len(parts) > 1:
        sums = [objective(*part, BETA, only_kl=True)[1] for part in parts]
        assert sum(int(s["num_documents"]) for s in sums) == 5
        batch_kl = torch.stack([s["charged_kl"] for s in sums]).sum() / 5
    loss = torch.stack([objective(*part, BETA, batch_kl=batch_kl)[0] for part in parts]).sum()
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    for one, other in zip(found, gradients, strict=True):
        one, other = (torch.zeros(()) if g is None else g for g in (one, other))
        assert float((one - other).abs().max()) < 1e-9
    in_evaluation, _ = objective.eval()(*parts[0], BETA)
    charged = objective.train()(*parts[0], BETA, batch_kl=torch.tensor(math.inf))[0]
    torch.testing.assert_close(in_evaluation, charged)


@pytest.mark.parametrize(("layers", "charged"), [([-1], [2]), ([0, 2], [0, 2]), (None, [0, 1, 2])])
def test_objective_charges_the_kl_of_the_layers_it_is_told(
    make_model, batch, noise, layers, charged
):
    model = make_model().double()
    weight = torch.full((5,), 0.2).double()
    loss, sums = Objective(model, kl_layers=layers)(*batch, noise, weight, BETA)
    terms = model.elbo_terms(*batch, noise)
    expected = terms.reconstruction_nll + BETA * terms.kl_per_layer[:, charged].sum(-1)
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(sums["kl"], terms.kl.sum())


def test_objective_bag_of_words_equals_a_plain_count_of_tokens(make_model, batch, noise):
    model = make_model().double()
    objective = Objective(model, bag_of_words=0.3).double()
    weight = torch.full((5,), 0.2).double()
    loss, sums = objective(*batch, noise, weight, BETA)
    terms = model.elbo_terms(*batch, noise)
    expected = terms.negative_elbo + (BETA - 1) * terms.kl
    without = expected.sum()
    linear = objective.bag_of_words.latents_to_hidden
    for row, (ids, mask) in enumerate(zip(*batch, strict=True)):
        z = terms.sample.latents[row].flatten()
        hidden = torch.tanh(linear.weight @ z + linear.bias)
        scores = (model.get_output_embeddings().weight @ hidden).log_softmax(0)
        counts = torch.bincount(ids[mask.bool()][1:], minlength=53)
        expected[row] = expected[row] - 0.3 * (counts * scores).sum()
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(0.3 * sums["bag_of_words_nll"], (expected.sum() - without).detach())
    assert not sums["bag_of_words_nll"].requires_grad


def test_objective_under_word_dropout_hides_tokens_from_the_decoder_alone(make_model, batch, noise):
    model = make_model().double()
    weight = torch.full((5,), 0.2).double()
    hidden = batch.input_ids.clone()
    hidden[:, 2] = 2
    loss, sums = Objective(model)(*batch, noise, weight, 1.0, decoder_input_ids=hidden)
    terms = model.elbo_terms(*batch, noise)
    logits = model(hidden, batch.attention_mask, latents=terms.sample.latents).logits
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch.input_ids[:, 1:], reduction="none"
    )
    expected = (nll * batch.attention_mask[:, 1:]).sum(-1) + terms.kl
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(sums["kl"], terms.kl.sum())


@pytest.mark.parametrize(
    ("options", "model_options", "message"),
    [
        (
            {"free_bits_per": "token"},
            {},
            "free_bits_per: expected one of batch, dimension, document, layer",
        ),
        ({"kl_layers": [3]}, {}, "kl_layers: expected latents from 0 to 2.*got 3"),
        ({"bag_of_words": -1.0}, {}, "bag_of_words: expected"),
        ({"bag_of_words": 1.0}, {"latents": "none"}, "bag_of_words: expected 0 for a model"),
    ],
)
def test_objective_that_cannot_be_says_so(make_model, options, model_options, message):
    with pytest.raises(ConfigError, match=message):
        Objective(make_model(**model_options), **options)


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
