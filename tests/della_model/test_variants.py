"""Every way that latents can be and enter the decoder, through the same objective."""

import copy

import pytest
import torch
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.t5 import modeling_t5

from della_model import FUSIONS, LATENTS, ConfigError, Della, DellaConfig, Objective
from della_model.backbones import BACKBONES
from della_model.fusion import LatentMemory
from della_model.routing import place_memory
from tests.della_model.backbone_data import FAMILIES
from tests.della_model.conftest import randomize

GREEDY = {"max_new_tokens": 9, "do_sample": False}
VARIANTS = [
    *({"fusion": name} for name in FUSIONS),
    {"latents": "single"},
    {"fusion": "paper", "fusion_residual": False},
    {"latents": "independent"},
    {"latents": "none"},
    {"latents": "constant"},
    {"encoder": "separate"},
    {"latents": "single", "fusion": "embed+memory", "latent_layers": [0, 1]},
]


def name_of(options):
    return "-".join(str(value) for value in options.values())


every_variant = pytest.mark.parametrize("options", VARIANTS, ids=name_of)


def noise_for(model, count):
    return model.draw_noise(count, generator=torch.Generator().manual_seed(3)).to(model.dtype)


@pytest.mark.slow
@every_variant
def test_variant_whole_loss_passes_gradcheck(
    make_model, backbone_config, documents, pad_documents, options
):
    backbone = backbone_config(n_embd=6, n_layer=2, n_positions=13)
    model = make_model(backbone, **{"latent_size": 2, "fusion_rank": 2, **options}).double()
    objective = Objective(model, free_bits=0.05).eval()
    assert passes_gradcheck(objective, pad_documents(documents[:2]))


@pytest.mark.slow
def test_variant_conditional_loss_with_its_aids_passes_gradcheck(
    backbone_config, documents, pad_documents
):
    aids = {"bag_of_words": 0.7, "free_bits": 0.05, "free_bits_per": "dimension"}
    backbone = backbone_config(n_embd=6, n_layer=2, n_positions=13)
    config = DellaConfig(backbone=backbone, fusion="embed+memory", conditional=True, latent_size=2)
    objective = Objective(randomize(Della(config)), **aids).double().eval()
    ids, mask = pad_documents([[1, 3, 14, 2], [1, 35, 2]])
    sources = {"condition_ids": ids, "condition_mask": mask}
    assert passes_gradcheck(objective, pad_documents(documents[:2]), **sources)


@pytest.mark.slow
@pytest.mark.parametrize("conditional", [False, True], ids=["alone", "from_sources"])
@pytest.mark.parametrize("family", FAMILIES)
def test_variant_whole_loss_of_every_family_passes_gradcheck(
    family, conditional, documents, pad_documents, norms_keep_float64
):
    # Not a token of the documents: an embedding never learns the row of what pads.
    backbone = copy.deepcopy(FAMILIES[family])
    backbone.pad_token_id = 0
    config = DellaConfig(backbone=backbone, latent_size=2, conditional=conditional)
    objective = Objective(randomize(Della(config)), free_bits=0.05).double().eval()
    ids, mask = pad_documents([[1, 3, 14, 2], [1, 35, 2]])
    sources = {"condition_ids": ids, "condition_mask": mask} if conditional else {}
    assert passes_gradcheck(objective, pad_documents(documents[:2]), **sources)


@pytest.fixture
def norms_keep_float64(monkeypatch):
    """transformers takes a root mean square in float32, too coarse for finite differences."""

    def forward(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)

    for module in (modeling_llama, modeling_mistral, modeling_qwen2, modeling_qwen3, modeling_t5):
        norms = [c for name, c in vars(module).items() if name.endswith(("RMSNorm", "LayerNorm"))]
        for norm in norms:
            monkeypatch.setattr(norm, "forward", forward)


def passes_gradcheck(objective, batch, **sources):
    noise, weight = noise_for(objective.model, 2), torch.tensor([0.3, 0.7]).double()
    trained = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    names, values = zip(*trained, strict=True)

    def loss(*parameters):
        replaced = dict(zip(names, parameters, strict=True))
        arguments = (*batch, noise, weight, 0.5)
        return torch.func.functional_call(
            objective, replaced, arguments, sources, tie_weights=True
        )[0]

    return torch.autograd.gradcheck(loss, values, fast_mode=True)


@every_variant
def test_variant_all_parameters_learn(make_model, batch, options):
    model = make_model(**options)
    model.elbo_terms(*batch, noise_for(model, 5)).negative_elbo.sum().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    if options.get("latent_layers") is None:
        assert idle == []


@every_variant
def test_variant_cached_equals_uncached_equals_one_at_a_time(make_model, options):
    model = make_model(**options)
    latents = 2 * model.sample_prior(5)
    for beams in (1, 3):
        settings = {**GREEDY, "num_beams": beams}
        cached = model.generate(latents=latents, use_cache=True, **settings)
        assert torch.equal(cached, model.generate(latents=latents, use_cache=False, **settings))
        for row in range(5):
            alone = model.generate(latents=latents[row : row + 1], **settings)
            assert torch.equal(cached[row, : alone.shape[1]], alone[0])


@every_variant
def test_variant_cached_logits_equal_uncached(make_model, batch, options):
    model = make_model(**options)
    latents, ids = model.sample_prior(5), batch.input_ids
    whole = model(ids, latents=latents).logits
    cache, pieces = None, []
    for piece in ids.split([4, 1, 1, 5], dim=1):
        output = model(piece, latents=latents, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)


@every_variant
def test_variant_padding_changes_nothing(make_model, documents, pad_documents, options):
    model = make_model(**options).double()
    noise = noise_for(model, 5)
    right, left = (
        model.elbo_terms(*pad_documents(documents, side, 17), noise) for side in ("right", "left")
    )
    torch.testing.assert_close(right.reconstruction_nll, left.reconstruction_nll)
    torch.testing.assert_close(right.kl_per_layer, left.kl_per_layer)


@every_variant
def test_variant_saves_and_loads_equal(make_model, batch, tmp_path, options):
    model = make_model(**options)
    model.save_pretrained(tmp_path)
    loaded = Della.from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    noise = noise_for(model, 5)
    ours, theirs = model(*batch, noise=noise), loaded(*batch, noise=noise)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.kl_per_layer, theirs.kl_per_layer)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@every_variant
def test_variant_gradient_checkpointing_gives_the_same_gradients(make_model, batch, options):
    model = make_model(**options).double().train()
    noise = noise_for(model, 5)

    def gradients():
        model.zero_grad()
        first = model.elbo_terms(*batch, noise).negative_elbo.sum()
        second = model.elbo_terms(*batch, noise.flip(0)).negative_elbo.square().sum()
        (first + second).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


@pytest.mark.parametrize("fusion", ["embed", "softmax", "add", "paper"])
@pytest.mark.parametrize("latents", LATENTS)
def test_variant_fresh_decoder_is_the_backbone(backbone_config, batch, fusion, latents):
    config = DellaConfig(backbone=backbone_config(), fusion=fusion, latents=latents, latent_size=5)
    model = Della(config).eval()
    plain = copy.deepcopy(model.backbone)
    expected = plain(**batch._asdict()).logits
    ours = model(*batch, latents=3 * model.sample_prior(5)).logits
    unpadded = batch.attention_mask.bool()
    torch.testing.assert_close(ours[unpadded], expected[unpadded])


def test_memory_with_an_attention_whose_mask_it_cannot_read_says_so(backbone_config):
    backbone = BACKBONES["gpt2"].build(backbone_config())
    backbone.config._attn_implementation = "flash_attention_2"
    attention = BACKBONES["gpt2"].self_attentions(backbone)[0]
    with pytest.raises(ConfigError, match=r"expected sdpa or eager .* got 'flash_attention_2'"):
        place_memory(attention, LatentMemory(2, 11, 5))
