"""Every fusion in every family: what holds for one of each must hold for each of all."""

import copy

import pytest
import torch

from della_model import FUSIONS, Condition, Della, DellaConfig
from tests.della_model.backbone_data import BOS, EOS, FAMILIES
from tests.della_model.conftest import assert_generations_agree, pad, randomize

PROMPTS = [[BOS, 9, 41], [BOS], [BOS, 17, 3, 30, 8]]
SOURCES = [[BOS, 3, 14, EOS], [BOS, 15, 9, 26, 5, EOS], [BOS, 35, EOS]]
DOCUMENTS = [[BOS, 11, 5, 23, 47, EOS], [BOS, 9, EOS], [BOS, 31, 31, 8, 52, 3, 17, 40, EOS]]


def cases():
    """Each pair with sources or without, in turns; a memory with both, for it shifts the keys.

    The memory's are the fast ones: the other fusions know nothing of a family's attention.
    """
    for i, family in enumerate(FAMILIES):
        for j, fusion in enumerate(FUSIONS):
            for conditional in (False, True):
                is_turn = (i + j) % 2 == conditional
                if is_turn or fusion == "memory":
                    is_fast = is_turn and fusion == "memory"
                    marks = () if is_fast else (pytest.mark.slow,)
                    yield pytest.param(family, fusion, conditional, marks=marks)


every_pair = pytest.mark.parametrize(("family", "fusion", "conditional"), list(cases()))


def build(family, fusion, conditional, **options):
    torch.manual_seed(5)
    backbone = copy.deepcopy(FAMILIES[family])
    sizes = {"latent_size": 5, "fusion_rank": 3}
    config = DellaConfig(
        backbone=backbone, fusion=fusion, conditional=conditional, **sizes, **options
    )
    return randomize(Della(config)).double().eval()


def noise_for(model):
    return model.draw_noise(3, generator=torch.Generator().manual_seed(3)).double()


@every_pair
def test_fusion_in_family_padding_changes_nothing_and_all_parameters_learn(
    family, fusion, conditional
):
    model = build(family, fusion, conditional)
    noise = noise_for(model)

    def terms(rows, side, more):
        condition = None
        if conditional:
            condition = Condition(*pad([SOURCES[row] for row in rows], side, more and 6 + more))
        batch = pad([DOCUMENTS[row] for row in rows], side, more and 9 + more)
        return model.elbo_terms(*batch, noise[rows], condition)

    alone = [terms([row], "right", 0) for row in range(3)]
    for side in ("right", "left"):
        together = terms(range(3), side, 2)
        for name in ("reconstruction_nll", "kl_per_layer"):
            expected = torch.cat([getattr(one, name) for one in alone])
            torch.testing.assert_close(getattr(together, name), expected)
    together.negative_elbo.sum().backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert [n for n, p in trained if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
@every_pair
def test_fusion_in_family_cached_uncached_and_batched_generation_agree(family, fusion, conditional):
    model = build(family, fusion, conditional)
    sources = SOURCES if conditional else None
    condition = Condition(*pad(SOURCES)) if conditional else None
    latents = 2 * model.sample_prior(noise=noise_for(model), condition=condition)
    assert_generations_agree(model, PROMPTS, sources, latents, max_new_tokens=7, do_sample=False)
