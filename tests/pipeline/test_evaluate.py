from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from della_model import iw_nll
from pipeline.errors import UserError
from pipeline.evaluation.blocks import (
    Arrays,
    Block,
    cut_blocks,
    load_arrays,
    save_arrays,
    spread_places,
)
from pipeline.evaluation.figures import (
    active_units,
    collapse,
    curve_figures,
    mutual_information,
    probe_figures,
    projection,
    shown,
    summarize,
    verdict,
)
from pipeline.evaluation.metrics.errors import bootstrap, mean, perplexity
from pipeline.noise import Purpose, Stream, document_noise
from pipeline.shards import Dataset
from pipeline.specs import EvaluateSpec
from pipeline.stages import evaluate as stage
from pipeline.storage import Location
from pipeline.weights import load_model
from tests.pipeline.evaluation_data import (
    LATENT_SIZE,
    evaluate_spec,
    measure_here,
    small_test_dataset,
    write_weights,
)

SAMPLES = 3  # importance samples of `evaluate_spec`


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_test_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> Location:
    return write_weights(tmp_path_factory.mktemp("weights"), dataset)


@pytest.fixture(scope="module")
def documents(weights: Location, dataset: Dataset) -> Arrays:
    return measure_here(weights, dataset, "documents")["documents"]


def words_of(dataset: Dataset) -> np.ndarray:
    return dataset.split("test").num_words_per_document()


@pytest.mark.slow
def test_figures_equal_a_plain_loop_over_documents(
    documents: Arrays, weights: Location, dataset: Dataset
) -> None:
    figures = summarize(documents, SAMPLES, words_of(dataset))
    split, model = dataset.split("test"), load_model(weights)
    shape = (model.config.num_latent_layers, model.config.latent_size)
    stream = Stream(0, Purpose.LIKELIHOOD)
    nll, kl, tightest, paper, lengths, means = [], [], [], [], [], []
    texts = [ids for group in range(len(split.row_groups)) for ids in split.read_row_group(group)]
    for place, document in enumerate(texts):
        ids = torch.tensor(document[None].astype(np.int64))
        mask = torch.ones_like(ids)
        draws = [document_noise(stream, [place], shape, draw) for draw in range(SAMPLES)]
        losses, divergences, weights_of_draws = [], [], []
        with torch.no_grad():
            for noise in draws:
                sample = model.infer(ids, mask, torch.tensor(noise))
                logits = model(ids, mask, latents=sample.latents).logits[:, :-1].double()
                picked = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
                losses.append(-picked.sum().item())
                divergences.append(sample.kl_per_layer[0].double().numpy())
                ratio = (sample.log_prior - sample.log_posterior)[0].double().numpy()
                weights_of_draws.append((-losses[-1] + ratio.sum(), -losses[-1] + ratio.mean()))
            zeros = torch.zeros(1, *shape)
            means.append(model.infer(ids, mask, zeros).latents[0].numpy())
            tightest.append(iw_nll(model, ids, mask, torch.tensor(np.stack(draws))).item())
        nll.append(np.mean(losses))
        kl.append(np.mean(divergences, axis=0))
        paper.append(-np.log(np.mean(np.exp([w for _, w in weights_of_draws]))))
        assert tightest[-1] == pytest.approx(
            -np.log(np.mean(np.exp([w for w, _ in weights_of_draws]))), rel=1e-5
        )
        lengths.append(len(document))
    tokens = sum(lengths) - 150
    assert figures["num_documents"] == 150
    assert figures["num_tokens"] == tokens
    assert figures["num_words"] == split.num_words
    assert figures["reconstruction_nll"] == pytest.approx(np.mean(nll), rel=1e-6)
    assert figures["kl_per_layer"] == pytest.approx(np.mean(kl, axis=0), rel=1e-5)
    assert np.sum(figures["kl_per_dimension"], axis=1) == pytest.approx(
        np.mean(kl, axis=0), rel=1e-5
    )
    assert figures["kl"] == pytest.approx(np.sum(kl) / 150, rel=1e-5)
    assert figures["negative_elbo"] == pytest.approx((np.sum(nll) + np.sum(kl)) / 150, rel=1e-6)
    assert figures["iw_nll"] == pytest.approx(np.mean(tightest), rel=1e-6)
    assert figures["elbo_gap"] == pytest.approx(
        figures["negative_elbo"] - figures["iw_nll"], rel=1e-9
    )
    assert figures["ppl_token"] == pytest.approx(math.exp(sum(tightest) / tokens), rel=1e-5)
    variances = np.var(means, axis=0, ddof=1)
    assert figures["active_units"]["0.01"] == (variances > 0.01).sum(axis=1).tolist()
    np.testing.assert_allclose(figures["posterior_mean_variance"], variances, rtol=1e-4)
    error = np.std(tightest, ddof=1) / math.sqrt(150)
    assert figures["standard_errors"]["iw_nll"] == pytest.approx(error, rel=1e-5)
    error = np.std(documents["kl_per_dimension"][:, 2, 3], ddof=1) / math.sqrt(150)
    found = figures["standard_errors"]["kl_per_dimension"][2][3]
    assert found == pytest.approx(error, rel=1e-5)
    convention = figures["paper_convention"]
    assert convention["kl"] == pytest.approx(figures["kl"] / 4, rel=1e-6)
    assert convention["negative_elbo"] == pytest.approx(np.mean(nll) + figures["kl"] / 4, rel=1e-6)
    assert convention["ppl"] == pytest.approx(math.exp(sum(paper) / sum(lengths)), rel=1e-5)
    assert "no bounds" in convention["sentence"]


@pytest.mark.slow
@pytest.mark.parametrize("batch_tokens", [1, 40, 300])
def test_figures_with_other_batches_are_the_same(
    documents: Arrays, weights: Location, dataset: Dataset, batch_tokens: int
) -> None:
    other = measure_here(weights, dataset, "documents", batch_tokens=batch_tokens)["documents"]
    np.testing.assert_allclose(other["iw_nll"], documents["iw_nll"], rtol=1e-6)
    a, b = (summarize(found, SAMPLES, words_of(dataset)) for found in (documents, other))
    for name in ("reconstruction_nll", "kl", "iw_nll", "negative_elbo", "ppl_token", "ppl_word"):
        assert b[name] == pytest.approx(a[name], rel=1e-6), name
    assert b["active_units"] == a["active_units"]


def test_figures_of_a_document_do_not_depend_on_the_block(
    documents: Arrays, weights: Location, dataset: Dataset
) -> None:
    blocks = [Block("documents", *ends) for ends in ((0, 30), (30, 97), (97, 150))]
    parts = measure_here(weights, dataset, "documents", blocks=blocks)["documents"]
    for name, values in documents.items():
        np.testing.assert_allclose(parts[name], values, rtol=1e-5, atol=1e-5, err_msg=name)


def test_more_draws_keep_the_first_ones(
    documents: Arrays, weights: Location, dataset: Dataset
) -> None:
    more = measure_here(weights, dataset, "documents", iw_samples=5)["documents"]
    np.testing.assert_allclose(more["latents"], documents["latents"], rtol=1e-5, atol=1e-5)


def test_curve_falls_and_starts_at_the_elbo(weights: Location, dataset: Dataset) -> None:
    values = {"iw_curve": [1, 5, 40], "iw_curve_documents": 60}
    found = measure_here(weights, dataset, "curve", **values)["curve"]
    figures = curve_figures(found, (1, 5, 40))
    assert figures["num_documents"] == 60
    gaps = [point["gap"] for point in figures["points"]]
    assert gaps == sorted(gaps)
    # K = 1 is the ELBO with its KL by the same draws instead of in closed form.
    assert abs(gaps[0]) < 4 * figures["points"][0]["gap_error"]
    assert gaps[2] > 4 * figures["points"][2]["gap_error"]


def test_curve_of_the_main_draws_is_the_main_bound(
    documents: Arrays, weights: Location, dataset: Dataset
) -> None:
    found = measure_here(weights, dataset, "curve", iw_curve=[SAMPLES], iw_curve_documents=150)
    np.testing.assert_allclose(found["curve"]["iw_nll"][:, 0], documents["iw_nll"], rtol=1e-6)


# --- mutual information --------------------------------------------------------------------------


def test_mutual_information_equals_all_pairs_by_the_model_itself(
    weights: Location, dataset: Dataset
) -> None:
    results = measure_here(weights, dataset, "mutual_information", max_documents=40)
    found = mutual_information(
        results["documents"], results["mutual_information"]["log_aggregate"], conditional=False
    )
    model, split = load_model(weights), dataset.split("test")
    texts = [ids for group in range(2) for ids in split.read_row_group(group)][:40]
    with torch.no_grad():
        ones = [torch.tensor(ids[None].astype(np.int64)) for ids in texts]
        features = torch.cat([model.features(ids, torch.ones_like(ids)) for ids in ones])
        latents = torch.tensor(results["documents"]["latents"])
        pairs = model.chain.log_posterior(features[:, None], latents[None]).double().sum(-1)
    expected = pairs.diagonal() - (pairs.logsumexp(0) - math.log(40))
    assert found["mutual_information"] == pytest.approx(expected.mean().item(), abs=1e-4)
    assert found["mutual_information"] <= math.log(40)
    parts = found["aggregate_posterior"]
    assert parts["kl"] == pytest.approx(found["mutual_information"] + parts["aggregate_kl"])
    assert not parts["above_kl"]
    assert parts["sentence"] is None


def gaussian_documents(posterior: np.ndarray, prior: np.ndarray) -> Arrays:
    return {"log_posterior": posterior, "log_prior": prior}


def test_saturated_mutual_information_is_said_to_be() -> None:
    log_aggregate = np.full(50, 3.0)
    documents = gaussian_documents(np.full(50, 3.0 + math.log(50)), np.full(50, -20.0))
    found = mutual_information(documents, log_aggregate, conditional=False)
    assert found["mutual_information"] == pytest.approx(math.log(50))
    assert found["aggregate_posterior"]["saturated"]
    assert "reached log N = 3.91 nats" in found["aggregate_posterior"]["sentence"]


def test_mutual_information_above_the_kl_is_said_to_be_wrong() -> None:
    random = np.random.default_rng(0)
    log_aggregate = random.normal(0, 0.1, 50)
    documents = gaussian_documents(log_aggregate + 1.0, log_aggregate + 0.5)
    found = mutual_information(documents, log_aggregate, conditional=False)
    assert found["aggregate_posterior"]["above_kl"]
    assert "cannot be" in found["aggregate_posterior"]["sentence"]
    of_pairs = mutual_information(documents, log_aggregate, conditional=True)
    assert "kl" not in of_pairs["aggregate_posterior"]


# --- active units, probe, projection -------------------------------------------------------------


def test_active_units_of_a_hand_made_model() -> None:
    """Two layers of three dimensions whose means are known multiples of one number a document."""
    x = np.linspace(-1, 1, 101)
    x /= x.std(ddof=1)
    scales = np.array([[0.0, 0.11, 0.5], [0.05, 0.44, 0.46]])  # variances: their squares
    found = active_units((x[:, None, None] * scales + 7).astype(np.float32))
    np.testing.assert_allclose(found["posterior_mean_variance"], scales**2, atol=1e-5)
    assert found["active_units"] == {"0.01": [2, 2], "0.2": [1, 1]}
    assert found["latent_size"] == 3


def test_probe_sees_the_layers_that_reach_the_output(
    weights: Location, dataset: Dataset, tmp_path: Path
) -> None:
    figures = probe_figures(measure_here(weights, dataset, "probe")["probe"])
    assert figures["num_documents"] == 7
    assert len(figures["layers"]) == 4
    assert all(row["token_kl"] > 1e-6 for row in figures["layers"])
    dead = write_weights(tmp_path, dataset, alive=False)
    figures = probe_figures(measure_here(dead, dataset, "probe")["probe"])
    assert figures["all_layers"]["token_kl"] < 1e-9


def test_projection_finds_the_plane_that_points_lie_in() -> None:
    random = np.random.default_rng(3)
    plane = random.normal(size=(200, 2)) * [5.0, 2.0]
    axes, _ = np.linalg.qr(random.normal(size=(12, 2)))
    found = projection((plane @ axes.T).reshape(200, 3, 4).astype(np.float32), np.arange(200))
    assert found is not None
    assert sum(found["shares"]) == pytest.approx(1)
    points = np.array(found["points"])
    # Distances between points are the plane's own, however its axes turn.
    expected = np.linalg.norm(plane - plane[0], axis=1)
    np.testing.assert_allclose(
        np.linalg.norm(points[:, :2] - points[0, :2], axis=1), expected, rtol=1e-3, atol=1e-3
    )
    assert points[:, 2].tolist() == list(range(200))
    assert projection(np.zeros((5, 1, 1), np.float32), np.arange(5)) is None


# --- parts ---------------------------------------------------------------------------------------


def test_blocks_cover_all_items_once() -> None:
    assert cut_blocks("a", 5, 2) == [Block("a", 0, 2), Block("a", 2, 4), Block("a", 4, 5)]
    assert cut_blocks("a", 0, 2) == []
    assert spread_places(3, 10) == [0, 3, 6]
    assert spread_places(30, 4) == [0, 1, 2, 3]


def test_block_saved_and_read_is_the_same(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3), "text": np.array(["ä b", ""])}
    file = Location.parse(tmp_path / "blocks" / "a.npz")
    save_arrays(arrays, file)
    again = load_arrays(file)
    np.testing.assert_array_equal(again["a"], arrays["a"])
    assert again["text"].tolist() == ["ä b", ""]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged; delete it"):
        load_arrays(file)


def test_perplexity_error_agrees_with_the_bootstrap() -> None:
    random = np.random.default_rng(5)
    tokens = random.integers(4, 40, 400)
    nll = tokens * random.normal(3.0, 0.4, 400) + random.normal(0, 2, 400)
    value, error = perplexity(nll, tokens)
    draws = random.integers(0, 400, (4000, 400))
    resampled = np.exp(nll[draws].sum(axis=1) / tokens[draws].sum(axis=1))
    assert error == pytest.approx(resampled.std(), rel=0.06)
    rows = np.stack([nll, tokens], axis=1)
    same = bootstrap(rows, lambda chosen: math.exp(chosen[:, 0].sum() / chosen[:, 1].sum()))
    assert same[0] == pytest.approx(value)
    assert same[1] == pytest.approx(error, rel=0.15)


def hand_made(nll: list[float], kl: list[list[float]]) -> Arrays:
    count, layers = len(nll), len(kl[0])
    return {
        "reconstruction_nll": np.array(nll),
        "kl_per_layer": np.array(kl).reshape(count, layers),
        "kl_per_dimension": np.array(kl).reshape(count, layers, 1),
        "iw_nll": np.array(nll),
        "paper_iw_nll": np.array(nll),
        "num_predicted": np.arange(3, 3 + count),
        "posterior_means": np.arange(2.0 * layers * count).reshape(count, layers, 2),
    }


def test_figures_of_one_document_have_no_error() -> None:
    figures = summarize(hand_made([7.0], [[0.5]]), 1, np.array([0]))
    assert figures["standard_errors"]["kl"] is None
    assert figures["ppl_word"] is None
    assert shown(figures["ppl_word"], None) == ("–", "–")
    assert mean(np.zeros(0)) == (None, None)


def test_nan_figures_are_refused() -> None:
    with pytest.raises(UserError, match=r"1 of 2 documents have NaN.*document 1"):
        summarize(hand_made([7.0, math.nan], [[0.5], [0.5]]), 1, np.array([1, 1]))


def test_collapsed_model_is_reported_as_collapsed(tmp_path: Path, dataset: Dataset) -> None:
    dead = write_weights(tmp_path, dataset, alive=False)
    results = measure_here(dead, dataset, "mutual_information")
    figures = summarize(results["documents"], SAMPLES, words_of(dataset))
    assert figures["kl"] < 1e-3
    assert figures["collapsed"]
    assert "collapsed" in verdict(figures)
    log_aggregate = results["mutual_information"]["log_aggregate"]
    found = mutual_information(results["documents"], log_aggregate, conditional=False)
    assert abs(found["mutual_information"]) < 1e-3
    assert sum(figures["active_units"]["0.01"]) == 0


def test_paid_but_unused_latents_are_reported_as_collapsed() -> None:
    figures: dict[str, Any] = {
        "kl": 3.0,
        "kl_per_layer": [1.0, 2.0],
        "num_documents": 9,
        "active_units": {"0.01": [0, 0], "0.2": [0, 0]},
    }
    assert "tell nothing" in str(collapse(figures))
    figures["active_units"] = {"0.01": [0, 1], "0.2": [0, 0]}
    assert collapse(figures) is None
    assert "1 of 10 dimensions" in verdict(figures | {"latent_size": LATENT_SIZE})


@pytest.mark.parametrize(("latents", "num_layers"), [("none", 0), ("single", 1)])
def test_baselines_are_evaluated_for_what_they_have(
    tmp_path: Path, dataset: Dataset, latents: str, num_layers: int
) -> None:
    baseline = write_weights(tmp_path, dataset, latents=latents)
    values: dict[str, Any] = {"max_documents": 30, "num_samples": 3}
    every = ("documents", "curve", "probe", "samples", "reconstructions", "mutual_information")
    results = measure_here(baseline, dataset, *every, **values)
    figures = summarize(results["documents"], SAMPLES, words_of(dataset)[:30])
    assert len(figures["kl_per_layer"]) == num_layers
    assert len(results["samples"]["text"]) == 3
    if latents == "none":
        assert set(results) == {"documents", "samples"}
        assert figures["iw_nll"] == figures["negative_elbo"] == figures["reconstruction_nll"]
    else:
        assert set(results) == set(every)
        assert results["probe"]["token_kl"].shape == (7, 2)


def test_model_without_latents_is_not_called_collapsed() -> None:
    documents = hand_made([7.0, 8.0], [[], []])
    documents["posterior_means"] = np.zeros((2, 0, 5), np.float32)
    documents["kl_per_dimension"] = np.zeros((2, 0, 5), np.float32)
    figures = summarize(documents, 1, np.array([1, 1]))
    assert figures["kl"] == 0
    assert figures["kl_per_layer"] == []
    assert not figures["collapsed"]
    assert figures["paper_convention"]["kl"] == 0
    assert "plain language model" in verdict(figures)


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


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("key", "package"), [("mauve_model", "mauve-text"), ("bertscore_model", "bert-score")]
)
def test_metric_whose_package_is_missing_is_refused_with_the_command(
    weights: Location,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    package: str,
) -> None:
    monkeypatch.setattr("pipeline.evaluation.metrics.extras.find_spec", lambda _: None)
    spec = evaluate_spec(**{key: str(tmp_path)})
    inputs = {"weights": weights, "dataset": dataset.folder}
    with pytest.raises(UserError, match=f"needs the package {package}.*pip install .*{package}"):
        stage.run_evaluate(spec, inputs, Location.parse(tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"iw_samples": 0}, "evaluate.iw_samples=0 is refused"),
        ({"iw_curve": [1, 0]}, r"evaluate.iw_curve.1=0 is refused"),
        ({"iw_curve": [10, 1]}, "should rise"),
        ({"iw_curve": []}, "asks for a curve"),
        ({"bleu_tokenizer": "13b"}, "is not one of"),
        ({"iw_sample": 3}, "did you mean 'iw_samples'"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EvaluateSpec.build({"evaluate": values})
