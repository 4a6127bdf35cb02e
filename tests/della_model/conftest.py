"""Shape annotations of the model are checked while its tests run; models here are tiny."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from jaxtyping import install_import_hook
from torch import Tensor
from transformers import GPT2Config

# All but `config`: transformers makes a dataclass of it whose signature hides what it accepts.
CHECKED = (
    "aggregate backbones bag_of_words estimators fusion gaussian head latents model objective "
    "outputs pooling probe routing"
).split()

# Before the first import of the package, or its functions are already defined unchecked.
with install_import_hook([f"della_model.{module}" for module in CHECKED], "beartype.beartype"):
    from della_model import Condition, Della, DellaConfig

BOS, EOS = 1, 2


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20220613)


class Batch(NamedTuple):
    input_ids: Tensor
    attention_mask: Tensor


def tiny_backbone(**changes: Any) -> GPT2Config:
    settings: dict[str, Any] = {
        "vocab_size": 53,
        "n_positions": 29,
        "n_layer": 3,
        "n_embd": 22,
        "n_head": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "initializer_range": 0.2,
    }
    return GPT2Config(**{**settings, **changes})


def randomize(model: Della, std: float = 0.3) -> Della:
    """Takes away the kind start: fusions at zero and heads at the prior would hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("fusion", "memory", "shift", "chain", "pooling")):
                parameter.normal_(std=std)
    return model


@pytest.fixture
def backbone_config() -> Callable[..., GPT2Config]:
    return tiny_backbone


@pytest.fixture
def make_model() -> Callable[..., Della]:
    """A model in evaluation mode whose parameters are all random."""

    def make(backbone: GPT2Config | None = None, **options: Any) -> Della:
        options = {"latent_size": 5, "fusion_rank": 3, **options}
        return randomize(Della(DellaConfig(backbone=backbone or tiny_backbone(), **options))).eval()

    return make


def pad(documents: list[list[int]], side: str = "right", to: int = 0) -> Batch:
    """Padding is filled with a real token's id: only the mask may tell it apart."""
    time = max(to, *map(len, documents))
    ids = torch.full((len(documents), time), 7)
    mask = torch.zeros(len(documents), time, dtype=torch.long)
    for row, document in enumerate(documents):
        start = 0 if side == "right" else time - len(document)
        ids[row, start : start + len(document)] = torch.tensor(document)
        mask[row, start : start + len(document)] = 1
    return Batch(ids, mask)


def assert_generations_agree(
    model: Della,
    prompts: list[list[int]],
    sources: list[list[int]] | None,
    latents: Tensor,
    *,
    max_new_tokens: int,
    **options: Any,
) -> None:
    """With the cache, without it, and each document alone, `generate` gives the same tokens."""
    options |= {"max_new_tokens": max_new_tokens, "pad_token_id": EOS, "eos_token_id": EOS}

    def continued(rows: list[int], **more: Any) -> Tensor:
        ids, mask = pad([prompts[row] for row in rows], side="left")
        if sources is not None:
            more["condition"] = Condition(*pad([sources[row] for row in rows]))
        out = model.generate(ids, attention_mask=mask, latents=latents[rows], **options, **more)
        out = out[:, ids.shape[1] :]
        return torch.nn.functional.pad(out, (0, max_new_tokens - out.shape[1]), value=EOS)

    cached = continued(list(range(len(prompts))))
    assert torch.equal(continued(list(range(len(prompts))), use_cache=False), cached)
    for row in range(len(prompts)):
        assert torch.equal(continued([row])[0], cached[row])


@pytest.fixture
def documents() -> list[list[int]]:
    return [
        [BOS, 11, 5, 23, 47, EOS],
        [BOS, 9, EOS],
        [BOS, 31, 31, 8, 52, 3, 17, 40, 6, 29, EOS],
        [BOS, 4, 19, 44, EOS],
        [BOS, 50, 12, 12, 33, 7, 7, EOS],
    ]


@pytest.fixture
def pad_documents() -> Callable[..., Batch]:
    return pad


@pytest.fixture
def batch(documents: list[list[int]]) -> Batch:
    return pad(documents)
