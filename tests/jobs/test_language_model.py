"""`model.latents=none` through the commands, as a user gives them: a plain language model."""

from __future__ import annotations

import json

import pytest

from della_model import Della
from pipeline.artifact import Artifact, now
from pipeline.storage import Location
from pipeline.training.metrics import read_rows
from tests.jobs.test_chain import artifact_of, run
from tests.pipeline.evaluation_data import small_test_dataset

pytestmark = pytest.mark.slow
LITTLE = [
    "evaluate.num_samples=5", "evaluate.iw_samples=3", "evaluate.max_documents=20",
    "evaluate.num_reconstructions=5", "evaluate.num_interpolations=1",
]  # fmt: skip


def test_language_model_is_trained_evaluated_and_generates(tmp_path):
    dataset = small_test_dataset(tmp_path / "data", documents=30).folder
    Artifact(dataset, "preprocess", "5" * 64, {}, {}, "done", now(), now(), 1.0).save()
    storage = f"storage={tmp_path / 'runs'}"
    trained = artifact_of(
        run(
            "train", f"dataset={dataset}", "experiment=baseline_language_model",
            "model.backbone=null", "model.size=tiny", "model.context=64",
            "train.max_epochs=null", "train.max_steps=4",
            "train.batch_tokens=256", "train.log_every=1", storage, cwd=tmp_path,
        )
    )  # fmt: skip
    rows = read_rows(Location.parse(trained))
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]
    for row in rows:
        assert (row["kl"], row["kl_per_layer"]) == (0, [])
        assert row["loss"] == pytest.approx(row["reconstruction_nll"])
        assert "bag_of_words_nll" not in row
    weights = trained / "weights" / "last"
    parts = Della.from_pretrained(weights).latent_parts()
    assert not [name for name, part in parts if list(part.parameters())]

    measured = artifact_of(
        run("evaluate", f"weights={weights}", f"dataset={dataset}", storage, *LITTLE, cwd=tmp_path)
    )
    figures = json.loads((measured / "artifact.json").read_text())["figures"]
    assert figures["kl"] == 0
    assert figures["iw_nll"] == pytest.approx(figures["reconstruction_nll"])
    assert len(figures["samples"]) == 5

    drawn = run("generate", f"weights={weights}", "mode=sample", "num=3", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr[-4000:]
    assert drawn.stdout.count("sample:") == 3
