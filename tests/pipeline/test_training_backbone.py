"""A pretrained backbone meets a dataset: vocabularies, special tokens, contexts, attention."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.errors import UserError
from pipeline.shards import Dataset
from pipeline.specs import TrainSpec
from pipeline.stages.train import check_inputs
from pipeline.tokenization import (
    load_hf,
    ordinary_size,
    special_ids,
    train_bpe,
    vocabulary_size,
)
from pipeline.training.model import (
    Vocabulary,
    build_model,
    check_attention,
    della_config,
    set_dropout,
)
from pipeline.training.trainable import set_trainable
from tests.della_model.backbone_data import FAMILIES
from tests.pipeline.preprocess_data import make_lines, make_spec, write_dataset, write_lines
from tests.pipeline.train_data import train_spec


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = train_bpe([make_lines(80, 3)], 300)
    tokenizer.save_pretrained(folder)
    config = GPT2Config(vocab_size=vocabulary_size(tokenizer), n_positions=64, n_layer=2,
                        n_embd=12, n_head=2, bos_token_id=0, eos_token_id=1)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def dataset_of(folder: Path, tokenizer: dict[str, Any], seed: int = 3) -> Dataset:
    text = write_lines(folder / "a.txt", make_lines(80, seed))
    corpus = {"train": text, "max_tokens": 60, "max_rejected": 1.0}
    return write_dataset(make_spec(corpus, tokenizer=tokenizer), folder / "out")


def spec_of(backbone: Path, **train: Any) -> TrainSpec:
    spec = train_spec().model_dump()
    spec["model"] = {"backbone": str(backbone), "size": None, "latent_size": 5}
    spec["train"] |= train
    return TrainSpec.build(spec)


def test_backbone_special_tokens_that_a_tokenizer_lacks_get_the_next_ids(backbone: Path) -> None:
    own = load_hf(str(backbone))
    more = load_hf(str(backbone), {"bos": "<s>", "pad": "<pad>"})
    size = vocabulary_size(own)
    assert (special_ids(more).bos, special_ids(more).eos, special_ids(more).pad) == (size, 1, 2)
    assert vocabulary_size(more) == size + 1
    assert ordinary_size(more) == ordinary_size(own) <= size


def test_backbone_with_added_special_tokens_is_resized_and_stays_tied(
    backbone: Path, tmp_path: Path
) -> None:
    tokenizer = {"kind": "hf", "path": str(backbone), "bos_token": "<s>"}
    dataset = dataset_of(tmp_path, tokenizer)
    spec, vocabulary = spec_of(backbone), Vocabulary.of(dataset)
    check_inputs(spec, dataset.folder)
    model = build_model(spec, vocabulary)
    plain = GPT2LMHeadModel.from_pretrained(backbone)
    old = plain.config.vocab_size
    assert vocabulary.bos_id == old
    embeddings = model.get_input_embeddings().weight
    assert len(embeddings) == model.config.backbone.vocab_size == old + 1
    assert torch.equal(embeddings[:old], plain.transformer.wte.weight)
    assert model.get_output_embeddings().weight is embeddings
    assert model.generation_config.bos_token_id == model.config.backbone.bos_token_id == old


def test_backbone_with_another_tokenizer_is_refused(backbone: Path, tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, {"kind": "bpe", "vocab_size": 290}, seed=11)
    with pytest.raises(UserError, match=r"ids mean something else \(id \d+ is .* tokenizer=hf"):
        check_inputs(spec_of(backbone), dataset.folder)


def test_backbone_with_too_few_embeddings_is_refused(tmp_path: Path) -> None:
    GPT2Config(vocab_size=280).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has 300 ids, but .* has embeddings for 280"):
        della_config(spec_of(tmp_path), Vocabulary(300, 300, 0, 1, 2))


def test_backbone_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "vocab_size": 300}')
    vocabulary = Vocabulary(300, 300, 0, 1, 2)
    with pytest.raises(UserError, match=r"one of bart, gpt2, llama, .*, got 'bert'"):
        della_config(spec_of(tmp_path), vocabulary)


def test_backbone_flash_attention_without_a_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"needs a CUDA GPU .* lacks a CUDA GPU; set model"):
        check_attention("flash_attention_2")
    check_attention("sdpa")


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_dropout_is_the_specs_in_every_family(family: str) -> None:
    from della_model import Della, DellaConfig

    model = Della(DellaConfig(backbone=copy.deepcopy(FAMILIES[family]), latent_size=5)).double()
    ids = torch.randint(3, 50, (3, 9))
    arguments = ids, torch.ones_like(ids), model.draw_noise(3).double()
    model.train()
    set_dropout(model, 0.0)
    one, two = (model.elbo_terms(*arguments).reconstruction_nll for _ in range(2))
    assert torch.equal(one, two)
    set_dropout(model, 0.3)
    one, two = (model.elbo_terms(*arguments).reconstruction_nll for _ in range(2))
    assert not torch.allclose(one, two)


def test_backbone_unknown_low_rank_target_names_those_there_are(backbone: Path) -> None:
    spec = spec_of(backbone, trainable="lora", lora={"targets": ["c_atn"]})
    model = build_model(spec, Vocabulary(300, 300, 0, 1, 2))
    with pytest.raises(UserError, match=r"c_atn names no matrix .*mean 'c_attn'.*c_attn, c_fc"):
        set_trainable(model, spec.train)


@pytest.mark.parametrize("switch", ["activation_checkpointing", "compile"])
@pytest.mark.slow
def test_backbone_switches_leave_loss_and_gradients(backbone: Path, switch: str) -> None:
    # In a process of its own: pytest's capturing of logs would switch the compiler's tracing on.
    multiprocessing.spawn(compare_switched, (backbone, switch), nprocs=1)


def compare_switched(_: int, backbone: Path, switch: str) -> None:
    from della_model import Objective

    ids = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    found = []
    for value in (False, True):
        spec = spec_of(backbone, **{switch: value})
        model = build_model(spec, Vocabulary(300, 300, 0, 1, 2)).train()
        set_dropout(model, 0.0)
        noise = model.draw_noise(3, generator=torch.Generator().manual_seed(2))
        loss, _ = Objective(model)(ids, torch.ones_like(ids), noise, torch.ones(3), 0.5)
        loss.backward()
        found.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    (loss, gradients), (other, others) = found
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
