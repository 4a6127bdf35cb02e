from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from della_model import Della, DellaConfig
from pipeline.errors import UserError
from pipeline.generation import (
    Decoding,
    check_mode,
    reconstruct_documents,
    reconstruct_texts,
    run_generate,
    sample_texts,
)
from pipeline.shards import Dataset
from pipeline.specs.generate import GenerateSpec
from pipeline.storage import Location
from pipeline.tokenization import encoder_of, special_ids
from pipeline.weights import load_model, load_weights_tokenizer
from tests.pipeline.evaluation_data import CONTEXT, small_test_dataset, write_weights

DRAWN = Decoding(max_tokens=12, temperature=1.0, top_p=0.9)
GREEDY = Decoding(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_test_dataset(tmp_path_factory.mktemp("data"), documents=12)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> Location:
    return write_weights(tmp_path_factory.mktemp("weights"), dataset)


@pytest.fixture(scope="module")
def model(weights: Location) -> Della:
    return load_model(weights)


@pytest.fixture(scope="module")
def tokenizer(weights: Location) -> Any:
    return load_weights_tokenizer(weights)


def test_samples_are_the_seeds_alone(model: Della, tokenizer: Any) -> None:
    first = sample_texts(model, tokenizer, 5, 3, DRAWN)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert sample_texts(model, tokenizer, 5, 3, DRAWN) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert sample_texts(model, tokenizer, 5, 4, DRAWN) != first
    assert len(set(first)) > 1


@pytest.mark.parametrize("decoding", [GREEDY, DRAWN])
def test_texts_do_not_depend_on_the_batch(model: Della, tokenizer: Any, decoding: Decoding) -> None:
    whole = sample_texts(model, tokenizer, 5, 3, decoding)
    assert sample_texts(model, tokenizer, 5, 3, decoding, batch_size=2) == whole


def test_reconstruction_is_the_greedy_decoding_of_the_posterior_mean(
    model: Della, tokenizer: Any, dataset: Dataset
) -> None:
    documents = list(dataset.split("test").read_row_group(0))[:4]
    found = reconstruct_documents(model, tokenizer, documents, 0, GREEDY, batch_size=3)
    special, encoder = special_ids(tokenizer), encoder_of(tokenizer)
    for document, text in zip(documents, found, strict=True):
        ids = torch.tensor(document[None].astype("int64"))
        zeros = torch.zeros(1, model.config.num_latent_layers, model.config.latent_size)
        with torch.no_grad():
            latents = model.infer(ids, torch.ones_like(ids), zeros).latents
            built = [special.bos]
            for _ in range(12):
                logits = model(torch.tensor([built]), latents=latents).logits[0, -1]
                built.append(int(logits.argmax()))
                if built[-1] == special.eos:
                    break
        assert text == encoder.decode(built[1:]).strip()


def test_reconstruction_from_draws_depends_on_the_seed(
    model: Della, tokenizer: Any, dataset: Dataset
) -> None:
    documents = list(dataset.split("test").read_row_group(0))
    drawn = Decoding(max_tokens=12)
    first = reconstruct_documents(model, tokenizer, documents, 0, drawn, "sample")
    assert reconstruct_documents(model, tokenizer, documents, 0, drawn, "sample") == first
    assert reconstruct_documents(model, tokenizer, documents, 1, drawn, "sample") != first


def test_beams_reach_a_text(model: Della, tokenizer: Any) -> None:
    beams = Decoding(max_tokens=6, temperature=0.0, num_beams=3)
    assert len(sample_texts(model, tokenizer, 2, 0, beams)) == 2


def test_max_tokens_ends_at_the_models_context(model: Della, tokenizer: Any) -> None:
    assert Decoding(max_tokens=500).options(CONTEXT, 0, [0])["max_new_tokens"] == CONTEXT - 1
    assert sample_texts(model, tokenizer, 1, 0, Decoding(max_tokens=500))


def test_empty_and_too_long_texts_are_refused(model: Della, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="text 2 is empty"):
        reconstruct_texts(model, tokenizer, ["a dog", "  "], 0, GREEDY)
    with pytest.raises(UserError, match=r"text 1 has \d+ tokens.*context is 64"):
        reconstruct_texts(model, tokenizer, ["zebra quiz " * 80], 0, GREEDY)


def generate(weights: Location, **values: Any) -> list[dict[str, str]]:
    return run_generate(GenerateSpec.build({"max_tokens": 8, "device": "cpu"} | values), weights)


def test_generate_reconstructs_each_line(weights: Location, tmp_path: Path) -> None:
    file = tmp_path / "in.txt"
    file.write_text("the dog runs.\nthe red house\n")
    rows = generate(weights, mode="reconstruct", input=str(file))
    assert [row["source"] for row in rows] == ["the dog runs.", "the red house"]
    assert all(set(row) == {"source", "reconstruction"} for row in rows)
    assert [set(row) for row in generate(weights, num=3)] == [{"sample"}] * 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not there"),
        (b"", "is empty"),
        (b"one\n\ntwo\n", "nothing in line 2"),
        (b"one\ntw\xff\n", "line 2, is not UTF-8"),
    ],
)
def test_bad_input_file_is_refused(
    weights: Location, tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "in.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        generate(weights, mode="reconstruct", input=str(file))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "reconstruct"}, "needs input=FILE"),
        ({"input": "x"}, "is for the other modes"),
        ({"mode": "smaple"}, "did you mean 'sample'"),
        ({"num_beams": 3, "temperature": 1.0}, "give one"),
        ({"num": 0}, "num=0 is refused"),
    ],
)
def test_bad_generate_spec_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GenerateSpec.build(values)


def test_unknown_device_is_refused(weights: Location) -> None:
    with pytest.raises(UserError, match="device=abacus is not there: expected auto"):
        generate(weights, device="abacus")


def test_generate_walks_between_texts_and_by_analogy(weights: Location, tmp_path: Path) -> None:
    file = tmp_path / "in.txt"
    file.write_text("the dog runs.\tthe red house\n")
    (row,) = generate(weights, mode="interpolate", input=str(file), steps=4)
    assert list(row) == ["from", "step 1", "step 2", "step 3", "step 4", "to"]
    ends = tmp_path / "ends.txt"
    ends.write_text("the dog runs.\nthe red house\n")
    rebuilt = [r["reconstruction"] for r in generate(weights, mode="reconstruct", input=str(ends))]
    assert [row["step 1"], row["step 4"]] == rebuilt
    file.write_text("the dog runs.\tthe dog runs.\tthe red house\n")
    (row,) = generate(weights, mode="analogy", input=str(file))
    assert row["analogy"] == rebuilt[1]


def test_generate_completes_prefixes_of_any_length_as_alone(
    weights: Location, tmp_path: Path
) -> None:
    file = tmp_path / "in.txt"
    file.write_text("the dog\nthe old red house near\n")
    rows = generate(weights, mode="complete", input=str(file), seed=5)
    assert [row["prefix"] for row in rows] == ["the dog", "the old red house near"]
    assert all(row["completion"].startswith(row["prefix"]) for row in rows)
    assert generate(weights, mode="complete", input=str(file), seed=5) == rows


@pytest.mark.parametrize(("mode", "count"), [("interpolate", 2), ("analogy", 3)])
def test_generate_with_a_wrong_number_of_texts_names_the_line(
    weights: Location, tmp_path: Path, mode: str, count: int
) -> None:
    file = tmp_path / "in.txt"
    file.write_text("one text alone\n")
    with pytest.raises(UserError, match=f"line 1, has 1 texts: expected {count}"):
        generate(weights, mode=mode, input=str(file))


@pytest.mark.parametrize("mode", ["reconstruct", "interpolate", "analogy"])
def test_mode_that_needs_latents_is_refused_for_a_model_without(model: Della, mode: str) -> None:
    config = DellaConfig(backbone=model.config.backbone, latents="none")
    with pytest.raises(UserError, match=rf"mode={mode} needs a model with latents.*mode=sample"):
        check_mode(mode, config)
    for other in ("sample", "complete"):
        check_mode(other, config)
    check_mode(mode, model.config)
