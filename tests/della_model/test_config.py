import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, GPT2LMHeadModel

from della_model import SIZES, ConfigError, Della, DellaConfig, backbone_config, gpt2_config


def test_config_defaults_are_usable():
    config = DellaConfig()
    assert config.backbone.model_type == "gpt2"
    assert config.num_latent_layers == 12
    assert list(config.latent_layer_indices) == list(range(12))


def test_config_layer_range_includes_both_ends(backbone_config):
    config = DellaConfig(backbone=backbone_config(), latent_layers=(1, 2))
    assert list(config.latent_layer_indices) == [1, 2]
    assert config.num_latent_layers == 2


def test_config_saved_and_loaded_is_equal(backbone_config, tmp_path):
    config = DellaConfig(
        backbone=backbone_config(), latent_size=7, latent_layers=[0, 1], pooling="mean"
    )
    config.save_pretrained(tmp_path)
    loaded = DellaConfig.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert type(loaded.backbone) is type(config.backbone)


def test_config_takes_its_backbone_as_a_dictionary(backbone_config):
    config = DellaConfig(backbone=backbone_config().to_dict(), latent_size=7)
    assert config.backbone.n_embd == 22


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_size": 0}, "latent_size: expected a whole number ≥ 1, got 0"),
        ({"latent_size": 3.5}, "latent_size: expected a whole number"),
        ({"latent_size": True}, "latent_size: expected a whole number"),
        ({"fusion_rank": 0}, "fusion_rank: expected a whole number ≥ 1, got 0"),
        ({"fusion": "lowrank"}, "got 'lowrank'. Did you mean 'low_rank'"),
        ({"latents": "layerwsie"}, "latents: expected one of .*Did you mean 'layerwise'"),
        ({"encoder": "own"}, "encoder: expected one of separate, shared, got 'own'"),
        (
            {"fusion": "add", "fusion_residual": False},
            "only a product with the values can replace them",
        ),
        ({"fusion_residual": "yes"}, "fusion_residual: expected true or false"),
        ({"pooling": "max"}, "pooling: expected one of attention, first_token, mean, got 'max'"),
        ({"latent_layers": [0, 3]}, r"0 ≤ first ≤ last ≤ 2.*got \[0, 3\]"),
        ({"latent_layers": [2, 1]}, "the range is empty"),
        ({"latent_layers": [0]}, "two whole numbers"),
        ({"latent_layers": "all"}, "two whole numbers"),
        ({"backbone": BertConfig()}, r"backbone.model_type: expected one of .*gpt2.*, got 'bert'"),
        ({"backbone": {"n_layer": 3}}, r"backbone.model_type: expected one of .*gpt2.*, got None"),
        (
            {"backbone": gpt2_config("tiny", 53, eos_token_id=53)},
            "eos_token_id: expected an id below",
        ),
    ],
)
def test_config_that_cannot_be_says_so(backbone_config, options, message):
    with pytest.raises(ConfigError, match=message):
        DellaConfig(**{"backbone": backbone_config(), **options})


def test_size_unknown_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'gpt2-medium'"):
        gpt2_config("gpt-medium", 53)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: expected"),
        ({"n_positions": 0}, "n_positions: expected"),
        ({"dropout": 1.0}, "dropout: expected"),
    ],
)
def test_size_with_numbers_out_of_range_says_so(options, message):
    with pytest.raises(ConfigError, match=message):
        gpt2_config(**{"size": "tiny", "vocab_size": 53, **options})


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_size_for_a_laptop_builds_a_model(size):
    config = gpt2_config(size, 53, n_positions=31, dropout=0.0, bos_token_id=1, eos_token_id=2)
    model = Della(DellaConfig(backbone=config))
    assert model.config.num_latent_layers == SIZES[size].num_layers
    assert model.generation_config.bos_token_id == 1


@pytest.mark.parametrize(
    ("size", "millions"),
    [("gpt2", 124.44), ("gpt2-medium", 354.82), ("gpt2-large", 774.03), ("gpt2-xl", 1557.61)],
)
def test_size_published_has_its_published_number_of_parameters(size, millions):
    import torch

    with torch.device("meta"):
        model = GPT2LMHeadModel(gpt2_config(size, 50257))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart", "t5"])
def test_config_a_size_is_as_deep_and_wide_in_every_family(family):
    config = backbone_config(family, "tiny", 53, n_positions=31, eos_token_id=2, pad_token_id=2)
    whole = DellaConfig(backbone=config)
    assert (config.vocab_size, config.hidden_size) == (53, 128)
    assert list(whole.latent_layer_indices) == [0, 1, 2, 3]


def test_config_a_llama_of_a_size_has_as_many_parameters_as_gpt2():
    counts = []
    for family in ("gpt2", "llama"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(backbone_config(family, "gpt2", 50257))
        counts.append(model.num_parameters())
    assert counts[1] == pytest.approx(counts[0], rel=0.01)


def test_config_unknown_family_names_the_nearest():
    with pytest.raises(ConfigError, match=r"one of bart, gpt2, llama, t5.*mean 'llama'"):
        backbone_config("lama", "tiny", 53)
