import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from della_model import Della, DellaConfig, InputError, Objective


def noise_for(model, documents):
    return model.draw_noise(len(documents), generator=torch.Generator().manual_seed(3))


def test_model_reconstruction_nll_equals_cross_entropy_of_its_logits(make_model, batch):
    model = make_model().double()
    latents = model.sample_prior(len(batch.input_ids))
    ours = model.reconstruction_nll(*batch, latents)
    logits = model(*batch, latents=latents).logits
    for row, (ids, mask) in enumerate(zip(*batch, strict=True)):
        length = int(mask.sum())
        expected = F.cross_entropy(logits[row, : length - 1], ids[1:length], reduction="sum")
        torch.testing.assert_close(ours[row], expected)


def test_model_forward_without_latents_equals_elbo_terms(make_model, batch):
    model = make_model()
    noise = noise_for(model, batch.input_ids)
    output, terms = model(*batch, noise=noise), model.elbo_terms(*batch, noise)
    torch.testing.assert_close(output.reconstruction_nll, terms.reconstruction_nll)
    torch.testing.assert_close(output.kl_per_layer, terms.kl_per_layer)
    assert output.num_predicted.tolist() == [5, 2, 10, 4, 7]
    assert output.logits.shape == (5, 11, 53)
    assert len(output.posteriors) == len(output.priors) == 3
    torch.testing.assert_close(terms.negative_elbo, terms.reconstruction_nll + terms.kl)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pooling", ["attention", "mean", "first_token"])
def test_model_padding_changes_neither_latents_nor_loss(
    make_model, backbone_config, documents, pad_documents, attention, pooling
):
    backbone = backbone_config(attn_implementation=attention)
    model = make_model(backbone, pooling=pooling).double()
    assert model.trunk.config._attn_implementation == attention
    noise = noise_for(model, documents).double()
    alone = [
        model.elbo_terms(*pad_documents([d]), n[None])
        for d, n in zip(documents, noise, strict=True)
    ]
    for side in ("right", "left"):
        for to in (0, 23):
            together = model.elbo_terms(*pad_documents(documents, side, to), noise)
            for row, one in enumerate(alone):
                torch.testing.assert_close(together.sample.latents[row], one.sample.latents[0])
                torch.testing.assert_close(together.kl_per_layer[row], one.kl_per_layer[0])
                torch.testing.assert_close(
                    together.reconstruction_nll[row], one.reconstruction_nll[0]
                )


def test_model_eager_equals_sdpa(make_model, backbone_config, batch):
    sdpa = make_model(backbone_config(attn_implementation="sdpa"))
    eager = Della._from_config(sdpa.config, attn_implementation="eager").eval()
    eager.load_state_dict(sdpa.state_dict())
    assert eager.trunk.config._attn_implementation == "eager"
    noise = noise_for(sdpa, batch.input_ids)
    torch.testing.assert_close(eager(*batch, noise=noise).logits, sdpa(*batch, noise=noise).logits)


def test_model_encoder_sees_the_whole_document_and_decoder_only_the_past(make_model, batch):
    model = make_model()
    changed = batch.input_ids.clone()
    changed[2, 10] = 41  # the last token of the longest document
    before, after = (model.features(ids, batch.attention_mask) for ids in (batch[0], changed))
    assert not torch.allclose(before[2, 0], after[2, 0], atol=1e-4)
    latents = model.sample_prior(5)
    before, after = (
        model(ids, batch.attention_mask, latents).logits for ids in (batch[0], changed)
    )
    torch.testing.assert_close(before[2, :10], after[2, :10])


def test_model_each_layers_latent_reaches_its_own_layer(make_model, batch):
    model = make_model(latent_layers=[1, 2])
    assert model.config.num_latent_layers == 2
    latents = model.sample_prior(5)

    def hidden(latents):
        output = model.trunk(**batch._asdict(), latents=latents, output_hidden_states=True)
        return output.hidden_states

    base = hidden(latents)
    for slot, layer in ((0, 1), (1, 2)):
        changed = latents.clone()
        changed[:, slot] += 1
        moved = [not torch.allclose(a, b) for a, b in zip(base, hidden(changed), strict=True)]
        assert moved == [state > layer for state in range(4)]


def test_model_fused_attention_equals_a_plain_computation(make_model, batch):
    model = make_model().double()
    latents = model.sample_prior(5)
    block = model.trunk.h[0]
    seen = {}
    block.attn.register_forward_hook(lambda _, args, output: seen.update(x=args[0], y=output[0]))
    model(*batch, latents=latents)
    fused = block.attn.c_attn
    query, key, value = fused.projection(seen["x"]).split(22, dim=-1)
    value = value + torch.stack(
        [fused.fusion(v[None], z[None])[0] - v for v, z in zip(value, latents[:, 0], strict=True)]
    )
    document, length = 2, 11  # the one without padding
    heads = [
        t[document, :length].unflatten(-1, (2, 11)).transpose(0, 1) for t in (query, key, value)
    ]
    expected = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(0, 1).flatten(1)
    torch.testing.assert_close(seen["y"][document], block.attn.c_proj(expected))


def test_model_keeps_no_latent_after_a_forward_or_an_exception(make_model, batch, monkeypatch):
    model = make_model()
    latents = model.sample_prior(5)
    projections = [block.attn.c_attn for block in model.trunk.h]
    plain = model.features(*batch)
    model(*batch, latents=latents)
    assert all(p.latent is None for p in projections)
    monkeypatch.setattr(projections[1].fusion, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(*batch, latents=latents)
    assert all(p.latent is None for p in projections)
    monkeypatch.undo()
    assert torch.equal(model.features(*batch), plain)


def test_model_deep_copy_is_independent(make_model, batch):
    model = make_model()
    twin = copy.deepcopy(model)
    latents = model.sample_prior(5)
    before = twin(*batch, latents=latents).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(*batch, latents=latents).logits, before)


def test_model_whole_loss_passes_gradcheck(make_model, backbone_config, documents, pad_documents):
    backbone = backbone_config(n_embd=6, n_layer=2, vocab_size=53, n_positions=13)
    model = make_model(backbone, latent_size=2, fusion_rank=2).double()
    objective = Objective(model, free_bits=0.05).eval()
    batch = pad_documents(documents[:2])
    noise, weight = noise_for(model, batch.input_ids), torch.tensor([0.3, 0.7]).double()
    names, values = zip(*[(n, p) for n, p in objective.named_parameters()], strict=True)

    def loss(*parameters):
        replaced = dict(zip(names, parameters, strict=True))
        arguments = (*batch, noise.double(), weight, 0.5)
        return torch.func.functional_call(objective, replaced, arguments, tie_weights=True)[0]

    assert torch.autograd.gradcheck(loss, values, fast_mode=True)
    for index in range(0, len(values), 5):  # the slow mode too, entry by entry, on some

        def loss_of_one(parameter, index=index):
            return loss(*values[:index], parameter, *values[index + 1 :])

        if values[index].numel() <= 60:
            assert torch.autograd.gradcheck(loss_of_one, (values[index],))


def test_model_in_bfloat16_is_finite_with_float32_terms(make_model, batch):
    model = make_model().to(torch.bfloat16)
    loss, sums = Objective(model).train()(
        *batch, noise_for(model, batch.input_ids), torch.full((5,), 0.2), 1.0
    )
    loss.backward()
    assert loss.dtype == sums["kl_per_layer"].dtype == torch.float32
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_model_all_parameters_learn(make_model, batch):
    model = make_model()
    terms = model.elbo_terms(*batch, noise_for(model, batch.input_ids))
    terms.negative_elbo.sum().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize("side", ["right", "left"])
def test_model_gradient_checkpointing_gives_the_same_gradients(
    make_model, documents, pad_documents, side
):
    model = make_model().double().train()
    batch = pad_documents(documents, side)
    noise = noise_for(model, documents).double()

    def gradients():
        model.zero_grad()
        # Two batches in one graph: a latent kept as state would be the second's in both.
        first = model.elbo_terms(*batch, noise).negative_elbo.sum()
        second = model.elbo_terms(*batch, noise.flip(0)).negative_elbo.square().sum()
        (first + second).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.trunk.h[0].gradient_checkpointing
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


def test_model_documents_of_bos_or_padding_alone_cost_nothing(make_model, batch):
    model = make_model()
    mask = batch.attention_mask.clone()
    mask[1], mask[3, 1:] = 0, 0
    terms = model.elbo_terms(batch.input_ids, mask, noise_for(model, mask))
    assert terms.num_predicted.tolist() == [5, 0, 10, 0, 7]
    assert terms.reconstruction_nll[[1, 3]].tolist() == [0, 0]
    assert terms.kl.isfinite().all()
    terms.negative_elbo.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    only_bos = model.elbo_terms(batch.input_ids[:, :1], mask[:, :1], noise_for(model, mask))
    assert only_bos.reconstruction_nll.tolist() == [0] * 5


def test_model_from_scratch_starts_as_its_parts_ask(backbone_config):
    model = Della(DellaConfig(backbone=backbone_config(initializer_range=0.2), latent_size=5))
    for block in model.trunk.h:
        assert not block.attn.c_attn.fusion.latent_factor.weight.any()
        value_factor = block.attn.c_attn.fusion.value_factor
        assert value_factor.weight.std().item() == pytest.approx(22**-0.5, rel=0.1)
        assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.2, rel=0.1)
    assert not model.chain.prior_heads[0].weight.any()
    assert not model.pooling[0].score.weight.any()


def test_model_does_not_change_the_callers_config(backbone_config):
    config = DellaConfig(backbone=backbone_config(), latent_size=5)
    before = copy.deepcopy(config.to_dict())
    model = Della(config)
    assert config.to_dict() == before
    assert model.config.backbone is model.backbone.config


def test_model_is_registered_with_the_auto_classes(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), DellaConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), Della)


def test_model_resized_vocabulary_still_trains(make_model, batch):
    model = make_model()
    model.resize_token_embeddings(59)
    assert model.config.backbone.vocab_size == 59
    terms = model.elbo_terms(*batch, noise_for(model, batch.input_ids))
    terms.negative_elbo.sum().backward()
    assert model(*batch).logits.shape[-1] == 59
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, b: m.elbo_terms(*b, torch.randn(5, 2, 5)),
            r"noise: expected shape .*\[5, 3, 5\]",
        ),
        (lambda m, b: m.reconstruction_nll(*b, torch.randn(5, 3, 7)), r"latents: expected shape"),
        (lambda m, b: m.generate(b[0], latents=torch.randn(5, 2, 5)), r"latents: expected shape"),
        (
            lambda m, _: m.features(torch.ones(2, 31).long(), torch.ones(2, 31).long()),
            "at most 29 positions, got 31",
        ),
    ],
)
def test_model_given_tensors_that_do_not_fit_says_so(make_model, batch, call, message):
    with pytest.raises(InputError, match=message):
        call(make_model(), batch)


def test_model_with_a_cache_but_no_latents_says_so(make_model, batch):
    model = make_model()
    cached = model(*batch, latents=model.sample_prior(5), use_cache=True)
    with pytest.raises(InputError, match="together with past_key_values"):
        model(batch.input_ids[:, :1], past_key_values=cached.past_key_values)


def test_model_every_parameter_belongs_to_a_module_that_runs(make_model, batch):
    """ZeRO-3 gathers a parameter when its own module's forward runs, and at no other time."""
    model = make_model()
    ran = set()
    for module in model.modules():
        module.register_forward_pre_hook(lambda m, *_: ran.add(m))
    model.elbo_terms(*batch, noise_for(model, batch.input_ids))
    owners = {m for m in model.modules() if any(True for _ in m.parameters(recurse=False))}
    assert owners <= ran
    assert all(not isinstance(m, nn.ModuleList) for m in owners)
