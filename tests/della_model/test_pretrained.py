import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from della_model import ConfigError, Della, Objective


@pytest.fixture
def gpt2_folder(backbone_config, tmp_path):
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(backbone_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def trained(gpt2_folder, batch):
    """A pretrained decoder after a few steps with latents, so that no weight is as it was."""
    model = Della.from_backbone(gpt2_folder, latent_size=5, fusion_rank=3)
    objective = Objective(model).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        loss, _ = objective(*batch, model.draw_noise(5), torch.full((5,), 0.2), 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pretrained_decoder_at_step_0_gives_the_backbones_own_logits(gpt2_folder, batch, attention):
    plain = GPT2LMHeadModel.from_pretrained(gpt2_folder, attn_implementation=attention).eval()
    model = Della.from_backbone(gpt2_folder, latent_size=5, attn_implementation=attention).eval()
    latents = 3 * model.sample_prior(5)
    assert model.trunk.config._attn_implementation == attention
    expected = plain(**batch._asdict()).logits
    ours = model(*batch, latents=latents).logits
    kept = batch.attention_mask.bool()
    torch.testing.assert_close(ours[kept], expected[kept], rtol=1e-6, atol=1e-6)


def test_pretrained_weights_are_the_files_own_and_the_rest_starts_as_from_scratch(gpt2_folder):
    model = Della.from_backbone(gpt2_folder, latent_size=5)
    plain = GPT2LMHeadModel.from_pretrained(gpt2_folder).state_dict()
    for name, value in model.backbone.state_dict().items():
        if ".fusion." not in name:
            assert torch.equal(value, plain[name.replace(".projection", "")]), name
    for block in model.trunk.h:
        assert not block.attn.c_attn.fusion.latent_factor.weight.any()
        assert block.attn.c_attn.fusion.value_factor.weight.std() > 0.1
    assert not model.chain.prior_heads[0].weight.any()


def test_pretrained_after_training_saves_and_loads_equal(trained, batch, tmp_path):
    trained.save_pretrained(tmp_path / "della")
    loaded = Della.from_pretrained(tmp_path / "della").eval()
    ours, theirs = trained.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for field in ("latent_size", "latent_layers", "fusion", "fusion_rank", "pooling"):
        assert getattr(loaded.config, field) == getattr(trained.config, field)
    assert loaded.config.backbone.to_diff_dict() == trained.config.backbone.to_diff_dict()
    noise = trained.draw_noise(5)
    for name in ("reconstruction_nll", "kl_per_layer", "logits"):
        one, other = (m(*batch, noise=noise)[name] for m in (trained, loaded))
        assert torch.equal(one, other), name
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_pretrained_saved_file_holds_tied_weights_once(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    tied = {"backbone.lm_head.weight", "backbone.transformer.wte.weight"}
    assert len(names & tied) == 1


def test_pretrained_loads_in_another_dtype(trained, batch, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = Della.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded(*batch).reconstruction_nll.isfinite().all()


def test_pretrained_untied_head_stays_untied(backbone_config, make_model, batch, tmp_path):
    model = make_model(backbone_config(tie_word_embeddings=False))
    model.save_pretrained(tmp_path)
    loaded = Della.from_pretrained(tmp_path).eval()
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight
    latents = model.sample_prior(5)
    assert torch.equal(
        loaded(*batch, latents=latents).logits, model(*batch, latents=latents).logits
    )


def test_pretrained_plain_backbone_as_weights_says_what_to_call(gpt2_folder):
    with pytest.raises(ConfigError, match="from_backbone"):
        Della.from_pretrained(gpt2_folder)


def test_pretrained_wrong_option_is_refused_before_weights_are_read(gpt2_folder):
    (gpt2_folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="latent_layers"):
        Della.from_backbone(gpt2_folder, latent_layers=[2, 3])
