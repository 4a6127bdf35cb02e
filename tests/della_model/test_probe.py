import pytest
import torch

from della_model import swap_effect


def test_swap_effect_equals_a_plain_loop_over_documents(make_model, batch, documents):
    model = make_model().double()
    z, partners = model.draw_noise(5).double(), model.draw_noise(5).double()
    found = swap_effect(model, *batch, z, partners)
    assert found.token_kl.shape == (4, 5)  # three layers, and all together
    for row, layers in enumerate(([0], [1], [2], [0, 1, 2])):
        for place, document in enumerate(documents):
            ids = torch.tensor([document])
            swapped = z[place : place + 1].clone()
            for layer in layers:
                swapped[0, layer] = partners[place, layer]
            with torch.no_grad():
                own = model(ids, latents=z[place : place + 1]).logits[0, :-1]
                other = model(ids, latents=swapped).logits[0, :-1]
            p, q = (torch.distributions.Categorical(logits=logits) for logits in (own, other))
            kl = torch.distributions.kl_divergence(p, q).mean()
            nll = (p.log_prob(ids[0, 1:]) - q.log_prob(ids[0, 1:])).sum()
            change = (own - other) - (own - other).mean(-1, keepdim=True)
            torch.testing.assert_close(found.token_kl[row, place], kl)
            torch.testing.assert_close(found.nll_increase[row, place], nll)
            torch.testing.assert_close(
                found.logit_change[row, place], change.square().mean().sqrt()
            )


def test_swap_with_oneself_changes_nothing(make_model, batch):
    model = make_model()
    z = model.draw_noise(5)
    found = swap_effect(model, *batch, z, z)
    assert found.token_kl.abs().max() == 0
    assert found.logit_change.max() == 0


def test_layer_whose_fusion_is_zero_has_no_effect(make_model, batch):
    model = make_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "h.1." in name and "latent_factor" in name:
                parameter.zero_()
    found = swap_effect(model, *batch, model.draw_noise(5), model.draw_noise(5))
    assert found.token_kl[1].abs().max() < 1e-12
    assert (found.token_kl[[0, 2, 3]] > 1e-6).all()
    assert found.nll_increase[3].abs().min() > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_effect_does_not_depend_on_padding(make_model, documents, pad_documents, side):
    model = make_model().double()
    z, partners = model.draw_noise(5).double(), model.draw_noise(5).double()
    plain = swap_effect(model, *pad_documents(documents), z, partners)
    padded = swap_effect(model, *pad_documents(documents, side, to=17), z, partners)
    torch.testing.assert_close(padded.token_kl, plain.token_kl)
    torch.testing.assert_close(padded.logit_change, plain.logit_change)
