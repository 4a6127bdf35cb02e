"""Documents from sources on their way through the pipeline: checks, batches, generation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from della_model import Della
from pipeline.batches import Position
from pipeline.errors import UserError
from pipeline.evaluation.figures import mutual_information
from pipeline.evaluation.text_figures import response_summary
from pipeline.generation import Decoding, check_mode, texts_for_sources
from pipeline.shards import Dataset
from pipeline.specs import TrainSpec
from pipeline.stages.train import check_inputs
from pipeline.storage import Location
from pipeline.tokenization import load_tokenizer
from pipeline.training.loader import Padding, Share, TrainLoader
from pipeline.training.model import Vocabulary, build_model
from pipeline.training.setup import batch_order
from tests.pipeline.evaluation_data import evaluate_spec, measure_here
from tests.pipeline.preprocess_data import make_lines, make_spec, write_dataset
from tests.pipeline.train_data import small_dataset, train_spec


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("pairs")
    rows = zip(make_lines(70, 1), make_lines(70, 2), strict=True)
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in rows))
    corpus = {"kind": "jsonl", "train": str(file), "source_field": "source",
              "text_field": "target", "valid_fraction": 0, "test_fraction": 0}  # fmt: skip
    return write_dataset(make_spec(corpus), folder / "out")


def spec_of(family: str, context: int) -> TrainSpec:
    return train_spec(model__family=family, model__context=context, train__batch_tokens=700)


def test_conditional_batches_carry_sources_and_count_them_in(dataset: Dataset) -> None:
    spec, split = spec_of("gpt2", 400), dataset.split("train")
    order = batch_order(spec, split)
    loader = TrainLoader(split, order, Position(), Share(0, 1, 1), Padding(2, 4, 5, 0))
    pairs = {
        (tuple(source.tolist()), tuple(document.tolist()))
        for i in range(len(split.row_groups))
        for source, document in zip(split.read_conditions(i), split.read_row_group(i), strict=True)
    }
    seen = 0
    for _ in range(order.num_batches(0)):
        step = loader.next()
        (batch,) = step.micro_batches
        assert batch.condition_ids is not None
        assert batch.condition_mask is not None
        lengths = batch.attention_mask.sum(1) + batch.condition_mask.sum(1)
        assert int(lengths.max()) * len(lengths) <= spec.train.batch_tokens
        assert step.num_tokens == int(batch.attention_mask.sum()) - len(batch.input_ids)
        ids = zip(batch.input_ids, batch.attention_mask, strict=True)
        conditions = zip(batch.condition_ids, batch.condition_mask, strict=True)
        for pair in zip(conditions, ids, strict=True):
            assert tuple(tuple(row[mask.bool()].tolist()) for row, mask in pair) in pairs
        seen += len(batch.input_ids)
    loader.close()
    assert seen == split.num_documents == 70


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gpt2", r"longest document with its source .* corpus.max_source_tokens and corpus.max_t"),
        ("bart", r"longest (document|source) of the split"),
    ],
)
def test_conditional_context_too_short_says_what_to_set(
    dataset: Dataset, family: str, message: str
) -> None:
    split = dataset.split("train")
    longest = max(split.max_length, split.max_condition_length)
    enough = split.max_pair_length if family == "gpt2" else longest
    check_inputs(spec_of(family, enough), dataset.folder)
    with pytest.raises(UserError, match=message) as caught:
        check_inputs(spec_of(family, enough - 1), dataset.folder)
    assert f"set model.context={enough}" in str(caught.value)


def built(dataset: Dataset, family: str, context: int = 400) -> tuple[Della, object]:
    conditional = dataset.split("train").is_conditional
    model = build_model(spec_of(family, context), Vocabulary.of(dataset), conditional).eval()
    return model, load_tokenizer(dataset.tokenizer_folder)


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_conditional_texts_do_not_depend_on_what_they_are_batched_with(
    dataset: Dataset, family: str
) -> None:
    model, tokenizer = built(dataset, family)
    with torch.no_grad():
        for _, part in model.latent_parts():
            for parameter in part.parameters():
                parameter.normal_(std=0.3)
    decoding = Decoding(max_tokens=9)
    sources = make_lines(5, 30)
    together = texts_for_sources(model, tokenizer, sources, 3, decoding)
    apart = texts_for_sources(model, tokenizer, sources, 3, decoding, batch_size=2)
    assert together == apart
    assert len(set(together)) > 1


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_conditional_weights_are_evaluated_with_their_sources(
    dataset: Dataset, tmp_path: Path, family: str
) -> None:
    model, tokenizer = built(dataset, family)
    with torch.no_grad():
        for _, part in model.latent_parts():
            for parameter in part.parameters():
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = Location.parse(tmp_path)
    every = ("documents", "curve", "probe", "responses", "reconstructions", "mutual_information")
    values = {"max_documents": 12, "num_sources": 5, "responses_per_source": 3, "num_samples": 2}
    values |= {"sample_max_tokens": 6, "num_reconstructions": 3, "probe_documents": 3}
    found = measure_here(weights, dataset, *every, split_name="train", **values)
    assert set(found) == set(every)
    assert found["responses"]["text"].shape == (5, 3)
    summary = response_summary(found["responses"], evaluate_spec(**values).evaluate)
    assert {"bleu", "self_bleu", "rouge_l", "distinct_2"} <= set(summary)
    assert summary["num_sources"] == 5
    alone = measure_here(
        weights, dataset, "documents", "responses", split_name="train", **values, batch_tokens=1
    )
    for name in ("reconstruction_nll", "iw_nll", "kl_per_layer"):
        np.testing.assert_allclose(
            alone["documents"][name], found["documents"][name], rtol=1e-5, atol=1e-5
        )
    assert alone["responses"]["text"].tolist() == found["responses"]["text"].tolist()
    log_aggregate = found["mutual_information"]["log_aggregate"]
    information = mutual_information(found["documents"], log_aggregate, conditional=True)
    assert information["mutual_information"] <= np.log(12)


def test_conditional_source_longer_than_the_context_says_so(dataset: Dataset) -> None:
    model, tokenizer = built(dataset, "llama", context=20)
    with pytest.raises(UserError, match=r"source 2 has \d+ tokens .* leaves room for 18"):
        texts_for_sources(model, tokenizer, ["a", "word " * 40], 0, Decoding())


def test_conditional_texts_of_a_model_without_sources_are_refused(tmp_path: Path) -> None:
    model, tokenizer = built(small_dataset(tmp_path), "gpt2")
    with pytest.raises(UserError, match="trained on sources"):
        texts_for_sources(model, tokenizer, ["a"], 0, Decoding())


@pytest.mark.parametrize("mode", ["sample", "reconstruct", "complete"])
def test_conditional_model_is_refused_without_sources(dataset: Dataset, mode: str) -> None:
    model, _ = built(dataset, "gpt2")
    with pytest.raises(UserError, match=rf"mode={mode} needs a model of texts alone.*mode=target"):
        check_mode(mode, model.config)
    check_mode("target", model.config)
