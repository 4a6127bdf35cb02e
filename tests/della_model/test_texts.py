"""The methods on texts, with a tokenizer beside the weights."""

import copy
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, PreTrainedTokenizerFast

from della_model import Condition, Della, InputError
from tests.della_model.backbone_data import FAMILIES
from tests.della_model.conftest import pad

WORDS = [f"w{i}" for i in range(50)]
TEXTS = ["w3 w4 w5 w6", "w9", "w10 w11 w12"]


@pytest.fixture
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture
def folder(make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def model(folder):
    return Della.from_pretrained(folder).eval()


def ids_of(text):
    return torch.tensor([[1, *(3 + int(word[1:]) for word in text.split()), 2]])


def test_texts_encode_names_the_posterior_of_each_layer(model):
    encoded = model.encode(TEXTS)
    assert list(encoded.posteriors) == ["layer_0", "layer_1", "layer_2"]
    for row, text in enumerate(TEXTS):
        ids = ids_of(text)
        sample = model.infer(ids, torch.ones_like(ids), torch.zeros(1, 3, 5))
        torch.testing.assert_close(encoded.latents[row], sample.latents[0])
        for layer, posterior in enumerate(sample.posteriors):
            named = encoded.posteriors[f"layer_{layer}"]
            torch.testing.assert_close(named.loc[row], posterior.loc[0])
            torch.testing.assert_close(named.log_scale[row], posterior.log_scale[0])


def test_texts_reconstruct_is_the_greedy_text_of_the_means(model):
    found = model.reconstruct(TEXTS, max_new_tokens=9)
    for row, text in enumerate(TEXTS):
        ids, latents = torch.tensor([[1]]), model.encode([text]).latents
        for _ in range(9):
            token = model(ids, latents=latents).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], dim=1)
            if token == 2:
                break
        words = [WORDS[i - 3] for i in ids[0].tolist() if i > 2]
        assert found[row] == " ".join(words)


def test_texts_interpolate_goes_from_one_reconstruction_to_the_other(model):
    path = model.interpolate(*TEXTS[:2], steps=5, max_new_tokens=9)
    assert len(path) == 5
    ends = model.reconstruct(TEXTS[:2], max_new_tokens=9)
    assert [path[0], path[-1]] == ends


def test_texts_analogy_adds_the_difference(model):
    a, b, c = model.encode(TEXTS).latents
    expected = model.decode((b - a + c)[None], max_new_tokens=9)
    assert [model.analogy(*TEXTS, max_new_tokens=9)] == expected
    assert model.analogy(TEXTS[0], TEXTS[0], TEXTS[2]) == model.reconstruct(TEXTS[2:])[0]


def test_texts_sample_with_a_seed_is_repeatable_and_leaves_the_random_state(model):
    state = torch.get_rng_state()
    first = model.sample(4, seed=3, max_new_tokens=9)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.sample(4, seed=3, max_new_tokens=9) == first
    assert model.sample(4, seed=4, max_new_tokens=9) != first
    assert len(model.sample(2, temperature=0.5, top_k=5, repetition_penalty=1.2)) == 2


def test_texts_one_latent_for_all_layers_has_one_name(make_model, model):
    single = make_model(latents="single")
    single.tokenizer = model.tokenizer
    assert list(single.encode(TEXTS).posteriors) == ["all_layers"]
    plain = make_model(latents="none")
    plain.tokenizer = model.tokenizer
    assert plain.encode(TEXTS).posteriors == {}
    assert len(plain.reconstruct(TEXTS)) == 3


def test_texts_without_a_tokenizer_or_a_text_say_so(make_model, model):
    with pytest.raises(InputError, match="expected a tokenizer beside the weights"):
        make_model().encode(TEXTS)
    for bad in ([], ["w1", " "], "w1"):
        with pytest.raises(InputError, match="texts: expected a list of texts"):
            model.encode(bad)
    with pytest.raises(InputError, match="steps: expected at least 2"):
        model.interpolate("w1", "w2", steps=1)


@pytest.fixture(params=["gpt2", "bart"])
def conditional(request, make_model, tokenizer):
    backbone = copy.deepcopy(FAMILIES[request.param])
    model = make_model(backbone, conditional=True)
    model.tokenizer = tokenizer
    return model


def condition_of(sources):
    rows = [ids_of(source)[0].tolist() for source in sources]
    return Condition(*pad(rows))


def test_texts_with_sources_are_encoded_and_decoded_under_them(conditional):
    model, sources = conditional, ["w7 w8 w9 w1", "w20", "w30 w2"]
    encoded = model.encode(TEXTS, sources=sources)
    for row, (text, source) in enumerate(zip(TEXTS, sources, strict=True)):
        ids, condition = ids_of(text), condition_of([source])
        sample = model.infer(ids, torch.ones_like(ids), torch.zeros(1, 3, 5), condition)
        torch.testing.assert_close(encoded.latents[row], sample.latents[0])
    found = model.reconstruct(TEXTS, sources=sources, max_new_tokens=9)
    for row, source in enumerate(sources):
        latents = encoded.latents[row : row + 1]
        ids = model.generate(
            latents=latents, condition=condition_of([source]), max_new_tokens=9, do_sample=False
        )
        words = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
        assert [found[row]] == [word.strip() for word in words]
    assert model.decode(encoded, sources=sources[::-1], max_new_tokens=9) != found


def test_texts_sampled_for_sources_come_source_after_source(conditional):
    model, sources = conditional, ["w7 w8 w9 w1", "w20"]
    several = model.sample(3, sources=sources, seed=3, max_new_tokens=9)
    assert len(several) == 6
    assert several == model.sample(3, sources=sources, seed=3, max_new_tokens=9)
    greedy = model.sample(2, sources=sources, seed=3, max_new_tokens=9, do_sample=False)
    noise = model.draw_noise(4, generator=torch.Generator().manual_seed(3))
    condition = condition_of([sources[0]] * 2 + [sources[1]] * 2)
    latents = model.sample_prior(noise=noise, condition=condition)
    repeated = [sources[0]] * 2 + [sources[1]] * 2
    assert greedy == model.decode(latents, sources=repeated, max_new_tokens=9)


def test_texts_between_and_by_analogy_share_a_source(conditional):
    model, options = conditional, {"max_new_tokens": 9}
    path = model.interpolate(*TEXTS[:2], steps=3, source="w7 w8", **options)
    ends = model.reconstruct(TEXTS[:2], sources=["w7 w8"] * 2, **options)
    assert [path[0], path[-1]] == ends
    same = model.analogy(TEXTS[0], TEXTS[0], TEXTS[1], source="w7 w8", **options)
    assert same == ends[1]


def test_texts_fill_the_context_that_their_sources_leave(conditional):
    source = " ".join(["w4"] * 25)
    assert len(conditional.sample(1, sources=[source], seed=1, eos_token_id=[])) == 1


def test_texts_without_their_sources_or_with_others_say_so(conditional, model):
    for call in (conditional.encode, conditional.reconstruct):
        with pytest.raises(InputError, match="sources: expected one a text, got none"):
            call(TEXTS)
    with pytest.raises(InputError, match="sources: expected one a text, got none"):
        conditional.sample(2)
    with pytest.raises(InputError, match="sources: expected none, got some"):
        model.encode(TEXTS, sources=TEXTS)
    with pytest.raises(InputError, match="sources: expected 3, one for each text, got 2"):
        conditional.encode(TEXTS, sources=TEXTS[:2])
    with pytest.raises(InputError, match="sources: expected a list of texts"):
        conditional.encode(TEXTS, sources=["w1", " ", "w2"])
    if not conditional.config.adapter.is_encoder_decoder:
        with pytest.raises(InputError, match=r"expected at most 28 tokens .* got 29"):
            conditional.sample(1, sources=[" ".join(["w4"] * 27)])


def test_model_saved_for_the_hub_has_its_card_tokenizer_and_weights(model, folder, tmp_path):
    out = tmp_path / "hub"
    manifest = {"splits": {"train": {"documents": 4211}}}
    figures = {"negative_elbo": 12.3456, "samples": ["not a number"], "collapsed": False}
    model.save_for_hub(out, "group/name", manifest, figures)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    assert "| negative_elbo | 12.35 |" in card
    assert "collapsed" not in card
    assert '"documents": 4211' in card
    written = card.split("## Configuration\n\n```json\n")[1].removesuffix("\n```\n")
    assert json.loads(written)["latent_size"] == 5
    again = AutoModel.from_pretrained(out).eval()
    assert again.reconstruct(TEXTS) == model.reconstruct(TEXTS)
