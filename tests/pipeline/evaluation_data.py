"""Tiny random weights for the small dataset of `train_data`, and specs to evaluate them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from della_model import Della, DellaConfig, gpt2_config
from pipeline.evaluation.blocks import Arrays, Block, joined
from pipeline.evaluation.worker import Evaluator, plan_blocks
from pipeline.shards import Dataset
from pipeline.specs import EvaluateSpec
from pipeline.storage import Location
from pipeline.tokenization import load_tokenizer, special_ids, vocabulary_size
from pipeline.weights import load_config
from tests.pipeline.train_data import sentences, write_dataset

CONTEXT = 64
LATENT_SIZE = 5


def small_test_dataset(folder: Path, documents: int = 150) -> Dataset:
    return write_dataset(
        folder, {"train": sentences(20, 1), "test": sentences(documents, 3)}, rows_per_group=37
    )


def write_weights(
    folder: Path, dataset: Dataset, *, alive: bool = True, **options: Any
) -> Location:
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
    model = Della(DellaConfig(backbone=backbone, latent_size=LATENT_SIZE, **options))
    for name, parameter in model.named_parameters():
        if alive and ("fusion" in name or "chain" in name):
            parameter.data += 0.15 * torch.randn_like(parameter)
        if not alive and "posterior_from_features" in name:
            parameter.data.zero_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Location.parse(folder)


def evaluate_spec(**values: Any) -> EvaluateSpec:
    chosen = {
        "iw_samples": 3,
        "iw_curve": [1, 2, 5],
        "iw_curve_documents": 11,
        "probe_documents": 7,
        "sample_max_tokens": 12,
        "num_samples": 9,
        "num_reconstructions": 7,
        "num_interpolations": 1,
        "use_gpu": False,
    }
    return EvaluateSpec.build({"evaluate": chosen | values})


def measure_here(
    weights: Location,
    dataset: Dataset,
    *measurements: str,
    blocks: list[Block] | None = None,
    split_name: str = "test",
    **values: Any,
) -> dict[str, Arrays]:
    """The measurements of an evaluation without Ray; `blocks` are those of the documents."""
    split, settings = dataset.split(split_name), evaluate_spec(**values).evaluate
    count = min(split.num_documents, settings.max_documents or split.num_documents)
    evaluator = Evaluator(weights, split, count, settings)
    planned = plan_blocks(settings, load_config(weights), count)
    if blocks is not None:
        planned["documents"] = blocks
    results: dict[str, Arrays] = {}
    for name, of_one in planned.items():
        if name in measurements or (name == "documents" and "mutual_information" in measurements):
            given = (results["documents"],) if name == "mutual_information" else ()
            results[name] = joined([evaluator.run(block, *given) for block in of_one])
    return results
