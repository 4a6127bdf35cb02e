"""A run's folder goes on with its own run alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.storage import Location
from pipeline.training.identity import claim_run
from pipeline.training.store import CHECKPOINTS, CheckpointStore
from tests.pipeline.train_data import small_dataset, train_spec
from tests.pipeline.train_runs import stored


def test_other_settings_data_or_code_are_refused_with_the_keys(
    tmp_path: Path,
) -> None:
    dataset, output = small_dataset(tmp_path / "data"), Location.parse(tmp_path / "run")
    store = CheckpointStore(output / CHECKPOINTS, keep=2)
    claim_run(train_spec(), dataset.folder, output)
    stored(store, 2, None)
    claim_run(train_spec(), dataset.folder, output)
    claim_run(train_spec(train__log_every=3), dataset.folder, output)  # is no identity
    with pytest.raises(UserError, match=r"config.train.learning_rate: 0.001 → 0.002.*another stor"):
        claim_run(train_spec(train__learning_rate=0.002), dataset.folder, output)
    other = small_dataset(tmp_path / "other", train=50)
    with pytest.raises(UserError, match=r"inputs.dataset: \w+… → \w+…"):
        claim_run(train_spec(), other.folder, output)
    record = (output / "run.json").read_json()
    record["versions"]["code"] = "0123456789ab"
    (output / "run.json").write_json(record)
    with pytest.raises(UserError, match=r"versions.code: 0123456789ab → .*accept_other_versions"):
        claim_run(train_spec(), dataset.folder, output)
    claim_run(train_spec(train__accept_other_versions=True), dataset.folder, output)
