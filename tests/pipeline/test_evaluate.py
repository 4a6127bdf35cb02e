from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from della_model import iw_nll
from pipeline.errors import UserError
from pipeline.evaluation.blocks import Block, BlockEvaluator, cut_blocks, padded
from pipeline.evaluation.documents import DocumentFigures, Moments
from pipeline.evaluation.figures import collapse, shown, summarize
from pipeline.noise import Purpose, Stream, document_noise
from pipeline.shards import Dataset
from pipeline.stages import evaluate as stage
from pipeline.storage import Location
from pipeline.weights import load_model
from tests.pipeline.evaluation_data import evaluate_spec, small_test_dataset, write_weights


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_test_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> Location:
    return write_weights(tmp_path_factory.mktemp("weights"), dataset)


def evaluate_here(
    weights: Location, dataset: Dataset, blocks: list[Block] | None = None, **values: Any
) -> DocumentFigures:
    """The stage's work without Ray."""
    split = dataset.split("test")
    evaluator = BlockEvaluator(weights, split, evaluate_spec(**values).evaluate)
    words = split.num_words_per_document()
    blocks = blocks or cut_blocks(split.num_documents)
    return DocumentFigures.join([evaluator.evaluate(b, words[b.start : b.stop]) for b in blocks])


def test_figures_equal_a_plain_loop_over_documents(weights: Location, dataset: Dataset) -> None:
    figures = summarize(evaluate_here(weights, dataset), 3)
    split, model = dataset.split("test"), load_model(weights)
    shape = (model.config.num_latent_layers, model.config.latent_size)
    stream = Stream(0, Purpose.LIKELIHOOD)
    nll, kl, tightest, tokens, means = [], [], [], 0, []
    documents = [
        ids for group in range(len(split.row_groups)) for ids in split.read_row_group(group)
    ]
    for place, document in enumerate(documents):
        ids = torch.tensor(document[None].astype(np.int64))
        mask = torch.ones_like(ids)
        draws = [document_noise(stream, [place], shape, draw) for draw in range(4)]
        noise = torch.tensor(np.stack(draws))
        with torch.no_grad():
            sample = model.infer(ids, mask, noise[0])
            logits = model(ids, mask, latents=sample.latents).logits[:, :-1].double()
            picked = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
            nll.append(-picked.sum().item())
            kl.append(sample.kl_per_layer[0].double().numpy())
            tightest.append(iw_nll(model, ids, mask, noise[1:]).item())
            means.append(model.infer(ids, mask, torch.zeros_like(noise[0])).latents[0].numpy())
        tokens += len(document) - 1
    assert figures["num_documents"] == 150
    assert figures["num_tokens"] == tokens
    assert figures["num_words"] == split.num_words
    assert figures["reconstruction_nll"] == pytest.approx(np.mean(nll), rel=1e-6)
    assert figures["kl_per_layer"] == pytest.approx(np.mean(kl, axis=0), rel=1e-5)
    assert figures["kl"] == pytest.approx(np.sum(kl) / 150, rel=1e-5)
    assert figures["negative_elbo"] == pytest.approx((np.sum(nll) + np.sum(kl)) / 150, rel=1e-6)
    assert figures["iw_nll"] == pytest.approx(np.mean(tightest), rel=1e-6)
    assert figures["ppl_token"] == pytest.approx(math.exp(sum(tightest) / tokens), rel=1e-5)
    variances = np.var(means, axis=0, ddof=1)
    assert figures["active_units"]["0.01"] == (variances > 0.01).sum(axis=1).tolist()
    error = np.std(tightest, ddof=1) / math.sqrt(150)
    assert figures["standard_errors"]["iw_nll"] == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 40, 300])
def test_figures_with_other_batches_are_the_same(
    weights: Location, dataset: Dataset, batch_tokens: int
) -> None:
    first = evaluate_here(weights, dataset)
    second = evaluate_here(weights, dataset, batch_tokens=batch_tokens)
    np.testing.assert_allclose(second.iw_nll, first.iw_nll, rtol=1e-6)
    a, b = summarize(first, 3), summarize(second, 3)
    for name in ("reconstruction_nll", "kl", "iw_nll", "negative_elbo", "ppl_token", "ppl_word"):
        assert b[name] == pytest.approx(a[name], rel=1e-6), name
    assert b["active_units"] == a["active_units"]


def test_figures_of_a_document_do_not_depend_on_the_block(
    weights: Location, dataset: Dataset
) -> None:
    whole = evaluate_here(weights, dataset)
    blocks = [Block(0, 30), Block(30, 97), Block(97, 150)]
    parts = evaluate_here(weights, dataset, blocks)
    np.testing.assert_allclose(parts.iw_nll, whole.iw_nll, rtol=1e-6)
    np.testing.assert_allclose(
        parts.posterior_means.variance, whole.posterior_means.variance, rtol=1e-4
    )


def test_moments_joined_equal_moments_of_all() -> None:
    random = np.random.default_rng(0)
    values = 1000 + random.normal(size=(37, 2, 3))
    joined = Moments.of(values[:5]).join(Moments.of(values[5:6])).join(Moments.of(values[6:]))
    np.testing.assert_allclose(joined.mean, values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(joined.variance, values.var(axis=0, ddof=1), rtol=1e-9)


def figures_of(nll: list[float], kl: list[list[float]], words: list[int]) -> DocumentFigures:
    count = len(nll)
    return DocumentFigures(
        np.array(nll),
        np.array(kl),
        np.array(nll),
        np.arange(3, 3 + count),
        np.array(words),
        Moments.of(np.arange(count * 2.0).reshape(count, 1, 2)),
    )


def test_block_saved_and_read_is_the_same(tmp_path: Path) -> None:
    block = figures_of([1.0, 2.5], [[0.5], [0.25]], [2, 3])
    file = Location.parse(tmp_path / "blocks" / "a.npz")
    block.save(file)
    again = DocumentFigures.load(file)
    np.testing.assert_array_equal(again.iw_nll, block.iw_nll)
    np.testing.assert_array_equal(again.posterior_means.mean, block.posterior_means.mean)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged; delete it"):
        DocumentFigures.load(file)


def test_perplexity_error_agrees_with_the_bootstrap() -> None:
    random = np.random.default_rng(5)
    tokens = random.integers(4, 40, 400)
    nll = tokens * random.normal(3.0, 0.4, 400) + random.normal(0, 2, 400)
    kl = np.full((400, 1), 0.3)
    moments = Moments.of(random.normal(size=(400, 1, 2)))
    found = summarize(DocumentFigures(nll, kl, nll, tokens, tokens // 2, moments), 1)
    draws = random.integers(0, 400, (4000, 400))
    bootstrap = np.exp(nll[draws].sum(axis=1) / tokens[draws].sum(axis=1)).std()
    assert found["standard_errors"]["ppl_token"] == pytest.approx(bootstrap, rel=0.06)


def test_figures_of_one_document_have_no_error() -> None:
    figures = summarize(figures_of([7.0], [[0.5]], [0]), 1)
    assert figures["standard_errors"]["kl"] is None
    assert figures["ppl_word"] is None
    assert shown(figures["ppl_word"], None) == ("–", "–")


def test_nan_figures_are_refused() -> None:
    with pytest.raises(UserError, match=r"1 of 2 documents have NaN.*document 1"):
        summarize(figures_of([7.0, math.nan], [[0.5], [0.5]], [1, 1]), 1)


def test_collapsed_model_is_reported_as_collapsed(tmp_path: Path, dataset: Dataset) -> None:
    dead = write_weights(tmp_path, dataset, alive=False)
    figures = summarize(evaluate_here(dead, dataset), 3)
    assert figures["kl"] < 1e-3
    assert figures["collapsed"]
    assert "collapsed" in str(collapse(figures))


def test_paid_but_unused_latents_are_reported_as_collapsed() -> None:
    figures = {"kl": 3.0, "num_documents": 9, "active_units": {"0.01": [0, 0], "0.2": [0, 0]}}
    assert "tell nothing" in str(collapse(figures))
    figures["active_units"] = {"0.01": [0, 1], "0.2": [0, 0]}
    assert collapse(figures) is None


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (38.7712, 0.2134, ("38.77", "0.21")),
        (1234.5, 12.3, ("1,234", "12")),
        (0.5, 3.2e-5, ("0.500000", "0.000032")),
        (3.14159, None, ("3.142", "–")),
    ],
)
def test_shown_figure_has_two_digits_of_its_error(
    value: float, error: float | None, expected: tuple[str, str]
) -> None:
    assert shown(value, error) == expected


def test_padded_marks_tokens() -> None:
    ids, mask = padded([np.array([5, 6], np.int32), np.array([7, 8, 9], np.int32)])
    assert ids.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]


# --- what the driver refuses before anything is started ------------------------------------------


def run(weights: Location, dataset: Dataset, output: Path, split: str = "test") -> Any:
    spec = evaluate_spec().model_copy(update={"split": split})
    inputs = {"weights": weights, "dataset": dataset.folder}
    return stage.run_evaluate(spec, inputs, Location.parse(output))


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(spec: Any) -> None:
        raise AssertionError("Ray was started before the inputs were checked")

    monkeypatch.setattr(stage, "connected", refuse)


@pytest.mark.usefixtures("no_ray")
def test_missing_split_is_refused(weights: Location, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no documents in a split 'valid'"):
        run(weights, dataset, tmp_path, "valid")


@pytest.mark.usefixtures("no_ray")
def test_other_tokenizer_is_refused(weights: Location, dataset: Dataset, tmp_path: Path) -> None:
    manifest = dict(dataset.manifest, tokenizer={"fingerprint": "0123456789abcdef"})
    other = Location.parse(tmp_path / "other")
    (other / "manifest.json").write_json(manifest)
    with pytest.raises(UserError, match=r"another tokenizer.*got 0123456789ab.*preprocess"):
        run(weights, Dataset.open(other), tmp_path)


@pytest.mark.usefixtures("no_ray")
def test_document_beyond_the_context_is_refused(
    weights: Location, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = dataset.split("test").lengths()
    longer = lengths.copy()
    longer[7] = 65
    monkeypatch.setattr("pipeline.shards.Split.lengths", lambda _: longer)
    with pytest.raises(UserError, match=r"context of 64 tokens \(document 7 has 65\)"):
        run(weights, dataset, tmp_path)
