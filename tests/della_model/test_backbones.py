"""The contract that every family of backbones keeps."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from della_model import Della, DellaConfig
from della_model.backbones import BACKBONES
from tests.della_model.backbone_data import BOS, EOS, FAMILIES
from tests.della_model.conftest import pad, randomize

family = pytest.mark.parametrize("family", FAMILIES)


def plain_backbone(family, folder, **options):
    """The family's own model, saved and loaded by transformers alone."""
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family])).save_pretrained(
        folder, **options
    )
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def model(family):
    """A model in evaluation mode whose latent parameters are all random."""
    torch.manual_seed(5)
    config = DellaConfig(backbone=copy.deepcopy(FAMILIES[family]), latent_size=5, fusion_rank=3)
    return randomize(Della(config)).eval()


def test_backbones_all_have_a_tiny_configuration_here():
    assert {config.model_type for config in FAMILIES.values()} == set(BACKBONES)


@family
def test_backbone_at_step_0_gives_its_own_logits(family, batch, tmp_path):
    plain = plain_backbone(family, tmp_path)
    model = Della.from_backbone(tmp_path, latent_size=5).eval()
    expected = plain(**batch._asdict()).logits
    ours = model(*batch, latents=3 * model.sample_prior(5)).logits
    kept = batch.attention_mask.bool()
    torch.testing.assert_close(ours[kept], expected[kept], rtol=1e-6, atol=1e-6)


@family
def test_backbone_of_several_safetensors_files_loads_whole(family, batch, tmp_path):
    plain = plain_backbone(family, tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = Della.from_backbone(tmp_path, latent_size=5).backbone.state_dict()
    for name, value in loaded.items():
        if ".fusion." not in name:
            assert torch.equal(value, plain.state_dict()[name.replace(".projection", "")]), name


@family
def test_backbone_encoder_sees_the_last_token_and_decoder_only_the_past(model, batch):
    changed = batch.input_ids.clone()
    changed[2, 10] = 41  # the last token of the longest document
    before, after = (model.features(ids, batch.attention_mask) for ids in (batch[0], changed))
    assert not torch.allclose(before[2, 0], after[2, 0], atol=1e-4)
    latents = model.sample_prior(5)
    before, after = (
        model(ids, batch.attention_mask, latents).logits for ids in (batch[0], changed)
    )
    torch.testing.assert_close(before[2, :10], after[2, :10])


@family
def test_backbone_padding_changes_neither_latents_nor_loss(model, documents):
    model = model.double()
    noise = model.draw_noise(5, generator=torch.Generator().manual_seed(3)).double()
    alone = [model.elbo_terms(*pad([d]), n[None]) for d, n in zip(documents, noise, strict=True)]
    for side in ("right", "left"):
        together = model.elbo_terms(*pad(documents, side, to=17), noise)
        for name in ("reconstruction_nll", "kl_per_layer", "num_predicted"):
            one_by_one = torch.cat([getattr(terms, name) for terms in alone])
            torch.testing.assert_close(getattr(together, name), one_by_one)


@family
def test_backbone_latents_reach_their_own_layers_alone(model, batch):
    latents = model.sample_prior(5)

    def hidden(latents):
        return model.trunk(
            **batch._asdict(), latents=latents, output_hidden_states=True
        ).hidden_states

    base = hidden(latents)
    for layer in range(3):
        changed = latents.clone()
        changed[:, layer] += 1
        moved = [not torch.allclose(a, b) for a, b in zip(base, hidden(changed), strict=True)]
        assert moved == [state > layer for state in range(4)]


@family
@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}], ids=str)
def test_backbone_cached_uncached_and_batched_generation_agree(model, options):
    model = model.double()
    prompts = [[BOS, 9, 41], [BOS], [BOS, 17, 3, 30, 8]]
    latents = model.sample_prior(3, generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 9, "pad_token_id": EOS, "eos_token_id": EOS, **options}
    ids, mask = pad(prompts, side="left")

    def continued(rows, ids, mask, **more):
        out = model.generate(ids, attention_mask=mask, latents=latents[rows], **options, **more)[
            :, ids.shape[1] :
        ]
        return torch.nn.functional.pad(out, (0, 9 - out.shape[1]), value=EOS)

    cached = continued([0, 1, 2], ids, mask)
    assert torch.equal(continued([0, 1, 2], ids, mask, use_cache=False), cached)
    for row, prompt in enumerate(prompts):
        alone = continued([row], *pad([prompt]))
        assert torch.equal(alone[0], cached[row])


@family
def test_backbone_saves_and_loads_equal_with_its_ties(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = Della.from_pretrained(tmp_path).eval()
    noise = model.draw_noise(5)
    for name in ("reconstruction_nll", "kl_per_layer", "logits"):
        assert torch.equal(*(m(*batch, noise=noise)[name] for m in (model, loaded))), name
    for one in (model, loaded):
        is_tied = one.get_output_embeddings().weight is one.get_input_embeddings().weight
        assert is_tied == one.config.backbone.tie_word_embeddings


@family
def test_backbone_gradients_reach_every_parameter(model, batch):
    model.train()
    noise = model.draw_noise(5, generator=torch.Generator().manual_seed(3))
    model.elbo_terms(*batch, noise).negative_elbo.sum().backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert [n for n, p in trained if p.grad is None or not p.grad.any()] == []


@family
def test_backbone_resized_vocabulary_keeps_its_ties(model, batch):
    model.resize_token_embeddings(59)
    assert model(*batch).logits.shape[-1] == 59
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_tied == model.config.backbone.tie_word_embeddings
