"""Artifacts name work by content, and their records can be trusted."""

from __future__ import annotations

import pytest

from pipeline.artifact import Artifact, digest, fingerprint, now
from pipeline.errors import UserError
from pipeline.storage import Location


def record(folder, **changes):
    values = {
        "folder": Location.parse(folder),
        "stage": "train",
        "fingerprint": "abc",
        "spec": {"a": 1},
        "inputs": {"dataset": "def"},
        "status": "done",
        "started_at": now(),
        "figures": {"kl": 1.5},
    }
    return Artifact(**{**values, **changes})


def test_fingerprint_of_fixed_values_is_the_same_on_every_machine():
    # Written down once: a change here means that all finished work would run again.
    value = fingerprint("train", {"b": [1, 2.5, None], "a": {"x": True}}, {"dataset": "0f"})
    assert value == "ecdd4ddb5e5932e2f9502ed8f082abb7355da842343f0d0fd4678a24800b1258"


def test_fingerprint_ignores_the_order_of_keys():
    assert fingerprint("s", {"a": 1, "b": 2}, {}) == fingerprint("s", {"b": 2, "a": 1}, {})


@pytest.mark.parametrize("change", ["stage", "spec", "inputs"])
def test_fingerprint_changes_with_everything_that_decides_the_result(change):
    parts = {"stage": "train", "spec": {"a": 1}, "inputs": {"d": "1"}}
    other = {**parts, change: {"stage": "tune", "spec": {"a": 2}, "inputs": {"d": "2"}}[change]}
    assert fingerprint(parts["stage"], parts["spec"], parts["inputs"]) != fingerprint(
        other["stage"], other["spec"], other["inputs"]
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1: 2}, {"a": [set()]}])
def test_digest_of_a_value_without_a_stable_form_is_refused(value):
    with pytest.raises(TypeError):
        digest(value)


def test_artifact_saved_and_loaded_is_equal_and_may_be_moved(tmp_path):
    record(tmp_path / "a").save()
    (tmp_path / "a").rename(tmp_path / "b")
    loaded = Artifact.load(Location.parse(tmp_path / "b"))
    assert loaded == record(tmp_path / "b", started_at=loaded.started_at)


def test_artifact_of_a_folder_without_a_record_says_so(tmp_path):
    assert Artifact.find(Location.parse(tmp_path)) is None
    with pytest.raises(UserError, match=r"holds no artifact\.json"):
        Artifact.load(Location.parse(tmp_path))


@pytest.mark.parametrize("text", ["{half", '{"format": 99}', "[]"])
def test_artifact_damaged_or_of_another_format_is_refused(tmp_path, text):
    (tmp_path / "artifact.json").write_text(text)
    with pytest.raises(UserError):
        Artifact.load(Location.parse(tmp_path))
