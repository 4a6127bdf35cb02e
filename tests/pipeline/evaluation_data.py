"""Tiny random weights for the small dataset of `train_data`, and specs to evaluate them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from della_model import Della, DellaConfig, gpt2_config
from pipeline.shards import Dataset
from pipeline.specs import EvaluateSpec
from pipeline.storage import Location
from pipeline.tokenization import load_tokenizer, special_ids, vocabulary_size
from tests.pipeline.train_data import sentences, write_dataset

CONTEXT = 64
LATENT_SIZE = 5


def small_test_dataset(folder: Path, documents: int = 150) -> Dataset:
    return write_dataset(
        folder, {"train": sentences(20, 1), "test": sentences(documents, 3)}, rows_per_group=37
    )


def write_weights(folder: Path, dataset: Dataset, *, alive: bool = True) -> Location:
    """A `from_pretrained` folder; `alive`: its latents move its logits, as training would do."""
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    special = special_ids(tokenizer)
    torch.manual_seed(11)
    backbone = gpt2_config(
        "tiny",
        vocab_size=vocabulary_size(tokenizer),
        n_positions=CONTEXT,
        bos_token_id=special.bos,
        eos_token_id=special.eos,
        pad_token_id=special.pad,
    )
    model = Della(DellaConfig(backbone=backbone, latent_size=LATENT_SIZE))
    for name, parameter in model.named_parameters():
        if alive and ("fusion" in name or "chain" in name):
            parameter.data += 0.15 * torch.randn_like(parameter)
        if not alive and "posterior_from_features" in name:
            parameter.data.zero_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Location.parse(folder)


def evaluate_spec(**values: Any) -> EvaluateSpec:
    chosen = {"iw_samples": 3, "sample_max_tokens": 12, "num_samples": 3, "use_gpu": False}
    return EvaluateSpec.build({"evaluate": chosen | values})
