"""The contract that every family of backbones keeps, with sources and without."""

import copy

import pytest
import torch

from della_model import Condition, Della, DellaConfig
from della_model.backbones import BACKBONES
from tests.della_model.backbone_data import BOS, EOS, FAMILIES
from tests.della_model.conftest import assert_generations_agree, pad, randomize

SOURCES = [[BOS, 3, 14, EOS], [BOS, 15, 9, 26, 5, EOS], [BOS, 35, EOS], [BOS, 8, 9, EOS],
           [BOS, 7, 7, 9, 32, 38, 46, EOS]]  # fmt: skip
family = pytest.mark.parametrize("family", FAMILIES)
conditional = pytest.mark.parametrize(
    "conditional", [False, True], ids=["unconditional", "conditional"]
)


def adapter_of(family):
    return BACKBONES[FAMILIES[family].model_type]


def plain_backbone(family, folder, **options):
    """The family's own model, saved and loaded by transformers alone."""
    torch.manual_seed(5)
    model_class = adapter_of(family).model_class
    built = model_class(copy.deepcopy(FAMILIES[family]))
    if family == "bart":
        built.final_logits_bias.normal_()
    built.save_pretrained(folder, **options)
    return model_class.from_pretrained(folder).eval()


@pytest.fixture
def model(family, conditional):
    """A model in evaluation mode whose latent parameters are all random."""
    torch.manual_seed(5)
    config = DellaConfig(
        backbone=copy.deepcopy(FAMILIES[family]),
        latent_size=5,
        fusion_rank=3,
        conditional=conditional,
    )
    return randomize(Della(config)).eval()


@pytest.fixture
def condition(conditional):
    return Condition(*pad(SOURCES)) if conditional else None


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def test_backbones_all_have_a_tiny_configuration_here():
    assert {config.model_type for config in FAMILIES.values()} == set(BACKBONES)


@family
@conditional
def test_backbone_at_step_0_gives_its_own_logits(family, conditional, condition, batch, tmp_path):
    plain, adapter = plain_backbone(family, tmp_path), adapter_of(family)
    model = Della.from_backbone(tmp_path, latent_size=5, conditional=conditional).eval()
    ids, mask = batch
    start = adapter.start_id(plain.config)
    if start is not None:
        ids = ids.clone()
        ids[:, 0] = start
    if conditional and not adapter.is_encoder_decoder:
        rows = zip(*condition, ids, mask, strict=True)
        joined = [torch.cat([c[cm.bool()], x[m.bool()]]) for c, cm, x, m in rows]
        each = [
            plain(row[None]).logits[0, -int(m.sum()) :] for row, m in zip(joined, mask, strict=True)
        ]
        expected = torch.zeros(*ids.shape, 53)
        expected[mask.bool()] = torch.cat(each)
    elif not adapter.is_encoder_decoder:
        expected = plain(**batch._asdict()).logits
    elif conditional:
        expected = plain(
            condition.input_ids, condition.attention_mask, decoder_input_ids=ids
        ).logits
    else:  # its decoder without cross-attention, which transformers gives without a head
        states = adapter.trunk(plain)(input_ids=ids).last_hidden_state
        expected = plain.lm_head(adapter.before_head(plain, states))
        bias = adapter.logits_bias(plain)
        expected = expected if bias is None else expected + bias
    latents = 3 * model.sample_prior(5, condition=condition)
    ours = model(*batch, latents=latents, condition=condition).logits
    kept = mask.bool()
    torch.testing.assert_close(ours[kept], expected[kept], rtol=1e-5, atol=1e-5)


@family
def test_backbone_of_several_safetensors_files_loads_whole(family, tmp_path):
    plain = plain_backbone(family, tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = Della.from_backbone(tmp_path, latent_size=5).backbone.state_dict()
    for name, value in loaded.items():
        if ".fusion." not in name:
            assert torch.equal(value, plain.state_dict()[name.replace(".projection", "")]), name


@family
@conditional
def test_backbone_encoder_sees_the_last_token_and_decoder_only_the_past(model, condition, batch):
    changed = batch.input_ids.clone()
    changed[2, 10] = 41  # the last token of the longest document
    before, after = (
        model.features(ids, batch.attention_mask, condition) for ids in (batch[0], changed)
    )
    assert not torch.allclose(before[2, 0], after[2, 0], atol=1e-4)
    latents = model.sample_prior(5, condition=condition)
    before, after = (
        model(ids, batch.attention_mask, latents, condition=condition).logits
        for ids in (batch[0], changed)
    )
    torch.testing.assert_close(before[2, :10], after[2, :10])


@family
@conditional
def test_backbone_padding_changes_neither_latents_nor_loss(model, conditional, documents):
    model = model.double()
    noise = model.draw_noise(5, generator=seeded()).double()

    def terms(rows, side="right", to=0):
        condition = None
        if conditional:
            condition = Condition(*pad([SOURCES[row] for row in rows], side, to and 10))
        batch = pad([documents[row] for row in rows], side, to)
        return model.elbo_terms(*batch, noise[rows], condition)

    alone = [terms([row]) for row in range(5)]
    for side in ("right", "left"):
        together = terms(range(5), side, to=17)
        for name in ("reconstruction_nll", "kl_per_layer", "num_predicted"):
            one_by_one = torch.cat([getattr(one, name) for one in alone])
            torch.testing.assert_close(getattr(together, name), one_by_one)


@family
@conditional
def test_backbone_latents_reach_their_own_layers_alone(model, batch):
    latents = (
        model.sample_prior(noise=model.draw_noise(5))
        if not model.config.conditional
        else (model.draw_noise(5))
    )

    def hidden(latents):
        output = model.trunk(**batch._asdict(), latents=latents, output_hidden_states=True)
        return output.hidden_states

    base = hidden(latents)
    for layer in range(3):
        changed = latents.clone()
        changed[:, layer] += 1
        moved = [not torch.allclose(a, b) for a, b in zip(base, hidden(changed), strict=True)]
        assert moved == [state > layer for state in range(4)]


@family
@conditional
@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}], ids=str)
def test_backbone_cached_uncached_and_batched_generation_agree(model, conditional, options):
    model = model.double()
    prompts = [[BOS, 9, 41], [BOS], [BOS, 17, 3, 30, 8]]
    sources = SOURCES[:3] if conditional else None
    condition = Condition(*pad(sources)) if conditional else None
    latents = model.sample_prior(3, condition=condition, generator=seeded())
    assert_generations_agree(model, prompts, sources, latents, max_new_tokens=9, **options)


@family
@conditional
def test_backbone_saves_and_loads_equal_with_its_ties(model, condition, batch, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = Della.from_pretrained(tmp_path).eval()
    noise = model.draw_noise(5)
    for name in ("reconstruction_nll", "kl_per_layer", "logits"):
        one, other = (m(*batch, noise=noise, condition=condition)[name] for m in (model, loaded))
        assert torch.equal(one, other), name
    for one in (model, loaded):
        is_tied = one.get_output_embeddings().weight is one.get_input_embeddings().weight
        assert is_tied == one.config.backbone.tie_word_embeddings


@family
@conditional
def test_backbone_gradients_reach_every_trained_parameter(model, condition, batch):
    model.train()
    noise = model.draw_noise(5, generator=seeded())
    model.elbo_terms(*batch, noise, condition).negative_elbo.sum().backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert [n for n, p in trained if p.grad is None or not p.grad.any()] == []
    # Only the cross-attention of a decoder without sources is left out.
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    cross = model.config.adapter.cross_attentions(model.backbone)
    assert bool(frozen) == (bool(cross) and not model.config.conditional)


@family
def test_backbone_resized_vocabulary_keeps_its_ties(family, batch):
    model = Della(DellaConfig(backbone=copy.deepcopy(FAMILIES[family]), latent_size=5))
    model.resize_token_embeddings(59)
    assert model(*batch).logits.shape[-1] == 59
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_tied == model.config.backbone.tie_word_embeddings
