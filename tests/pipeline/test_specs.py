"""Specs refuse what is wrong with one sentence, and say what identifies a piece of work."""

from __future__ import annotations

import pytest

from pipeline.errors import UserError
from pipeline.specs import (
    ClusterSpec,
    CorpusSpec,
    OptimizationSpec,
    PreprocessSpec,
    Range,
    TrainSpec,
    TuneSpec,
)

TRAIN = {"model": {"size": "tiny"}, "train": {"max_steps": 3}}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"max_step": 3}, "unknown key 'max_step' (did you mean 'max_steps'?)"),
        ({"max_steps": 1.5}, "max_steps=1.5 is refused: input should be a valid integer"),
        ({"max_steps": -1}, "max_steps=-1 is refused: input should be greater than 0"),
        ({"max_steps": "many"}, "max_steps='many' is refused"),
        ({"max_steps": 1, "precision": "bf61"}, "not one of fp32, bf16 (did you mean 'bf16'?)"),
        ({"max_steps": 1, "beta": {"kin": 1}}, "unknown key 'beta.kin' (did you mean 'kind'?)"),
        ({"max_steps": 1, "beta": {"kind": "cyclical", "low": 0.9}}, "beta.low + beta.ramp"),
        ({}, "give train.max_steps or train.max_epochs"),
    ],
)
def test_spec_wrong_value_names_the_key_and_the_remedy(values, expected):
    with pytest.raises(UserError) as caught:
        OptimizationSpec.build(values, "train")
    assert expected in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"kind": "text"}, "needs corpus.train="),
        ({"kind": "hf"}, "needs corpus.path="),
        ({"kind": "txt", "train": "a"}, "did you mean 'text'?"),
        ({"kind": "python_docs", "valid_fraction": 0.6, "test_fraction": 0.5}, "add up to 1.1"),
    ],
)
def test_corpus_spec_without_a_source_says_what_is_needed(values, expected):
    with pytest.raises(UserError) as caught:
        CorpusSpec.build(values)
    assert expected in caught.value.message


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"uniform": [0, 1], "choice": [1]},
        {"uniform": [1, 0]},
        {"loguniform": [0, 1]},
        {"choice": []},
    ],
)
def test_range_ill_formed_is_refused(values):
    with pytest.raises(UserError):
        Range.build(values)


def test_identity_ignores_where_and_how_fast_a_stage_runs():
    plain = TrainSpec.build(TRAIN)
    moved = TrainSpec.build(
        {
            "model": {"size": "tiny"},
            "train": {"max_steps": 3, "log_every": 7, "max_failures": 0},
            "cluster": {"address": "elsewhere:1", "verbose": True},
        }
    )
    other = TrainSpec.build({**TRAIN, "train": {"max_steps": 4}})
    assert plain.identity() == moved.identity()
    assert plain.identity() != other.identity()


def test_identity_of_a_corpus_leaves_paths_to_the_content_of_the_files():
    def spec(path: str) -> PreprocessSpec:
        corpus = {"kind": "text", "train": path}
        return PreprocessSpec.build(
            {"corpus": corpus, "tokenizer": {"kind": "bpe", "vocab_size": 300}}
        )

    assert spec("/here/a.txt").identity() == spec("s3://there/b.txt").identity()


def test_specs_survive_a_round_trip_through_plain_values():
    tune = TuneSpec.build(
        {
            "search": {"space": {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}}},
            "trial": TRAIN,
        }
    )
    assert TuneSpec.build(tune.model_dump(mode="json")) == tune
    assert ClusterSpec.build({}) == ClusterSpec()
