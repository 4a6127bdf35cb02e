import copy

import pytest
import torch

from della_model import InputError
from della_model.fusion import LowRankTensorFusion
from tests.della_model.backbone_data import FAMILIES

GREEDY = {"max_new_tokens": 13, "do_sample": False}


def test_generation_cached_logits_equal_uncached(make_model, batch):
    model = make_model()
    latents, ids = model.sample_prior(5), batch.input_ids
    whole = model(ids, latents=latents).logits
    cache, pieces = None, []
    for piece in ids.split([4, 1, 1, 5], dim=1):
        output = model(piece, latents=latents, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        GREEDY,
        {**GREEDY, "num_beams": 3, "num_return_sequences": 2},
        {**GREEDY, "do_sample": True, "top_k": 11, "temperature": 1.3},
        {**GREEDY, "do_sample": True, "top_p": 0.8, "num_return_sequences": 3},
    ],
    ids=["greedy", "beams", "top_k", "top_p"],
)
def test_generation_cached_equals_uncached(make_model, settings):
    model = make_model()
    latents = model.sample_prior(5)
    generated = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        generated.append(model.generate(latents=latents, use_cache=use_cache, **settings))
    assert torch.equal(*generated)
    assert len(generated[0]) == 5 * settings.get("num_return_sequences", 1)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_batched_equals_one_at_a_time(make_model, beams):
    model = make_model()
    latents = model.sample_prior(5)
    together = model.generate(latents=latents, num_beams=beams, **GREEDY)
    for row in range(5):
        alone = model.generate(latents=latents[row : row + 1], num_beams=beams, **GREEDY)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("count", [1, 2, 3])  # the rank is 3: fewer documents are folded
@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
def test_generation_of_few_documents_gives_what_many_give(make_model, family, count):
    model = make_model(copy.deepcopy(FAMILIES[family]), latent_layers=[1, 2]).double()
    latents = model.sample_prior(5)
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    many = model.generate(latents=latents, **options)
    few = model.generate(latents=latents[:count], **options)
    for one, other in zip(few, many, strict=False):
        width = min(len(one), len(other))
        assert torch.equal(one[:width], other[:width])
    fusions = [part for part in model.modules() if isinstance(part, LowRankTensorFusion)]
    assert len(fusions) == 2
    assert all(fusion.folded is None for fusion in fusions)


def test_generation_greedy_equals_a_plain_loop(make_model):
    model = make_model()
    latents = model.sample_prior(3)
    ids = torch.ones(3, 1).long()
    for _ in range(7):
        ids = torch.cat([ids, model(ids, latents=latents).logits[:, -1:].argmax(-1)], dim=1)
    generated = model.generate(latents=latents, max_new_tokens=7, do_sample=False, eos_token_id=[])
    assert torch.equal(generated, ids)


def test_generation_depends_on_the_latents(make_model):
    model = make_model()
    same = model.sample_prior(1).expand(2, -1, -1)
    assert torch.equal(*model.generate(latents=same, **GREEDY))
    rows = {tuple(r.tolist()) for r in model.generate(latents=4 * model.sample_prior(7), **GREEDY)}
    assert len(rows) > 1


def test_generation_of_left_padded_prompts_equals_unpadded(make_model, documents, pad_documents):
    model = make_model()
    prompts = [document[:-1] for document in documents]
    latents = model.sample_prior(5)
    ids, mask = pad_documents(prompts, "left")
    together = model.generate(ids, attention_mask=mask, latents=latents, **GREEDY)
    for row, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), latents=latents[row : row + 1], **GREEDY)
        new = alone[0, len(prompt) :]
        assert torch.equal(together[row, ids.shape[1] :][: len(new)], new)


def test_generation_without_latents_draws_them_from_the_prior(make_model):
    model = make_model()
    noise = model.draw_noise(3)
    expected = model.generate(latents=model.sample_prior(noise=noise), **GREEDY)
    assert torch.equal(model.generate(noise=noise, **GREEDY), expected)
    with_seed = [
        model.generate(num_documents=3, generator=torch.Generator().manual_seed(2), **GREEDY)
        for _ in range(2)
    ]
    assert torch.equal(*with_seed)
    assert len(model.generate(**GREEDY)) == 1
    assert (with_seed[0][:, 0] == 1).all()


def test_generation_where_one_id_is_bos_eos_and_padding_is_right(make_model, backbone_config):
    """As in GPT-2: transformers must not take the BOS that it starts from for padding."""
    model = make_model(backbone_config(bos_token_id=2))
    latents = model.sample_prior(3)
    generated = model.generate(latents=latents, **GREEDY)
    first = model(torch.full((3, 1), 2), latents=latents).logits[:, -1].argmax(-1)
    assert torch.equal(generated[:, 1], first)


def test_generation_fills_the_context_and_no_more(make_model):
    model = make_model()
    full = model.generate(max_new_tokens=29, do_sample=True, eos_token_id=[])
    assert full.shape == (1, 30)
    with pytest.raises(InputError, match="max_new_tokens: expected at most 29, got 30"):
        model.generate(max_new_tokens=30)


def test_generation_without_a_beginning_says_so(make_model, backbone_config):
    model = make_model(backbone_config(bos_token_id=None))
    with pytest.raises(InputError, match="bos_token_id"):
        model.generate(num_documents=2)
