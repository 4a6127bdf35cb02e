"""Secrets stay out of records and logs; names stay below the storage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.artifact import Artifact
from pipeline.chain.stage_log import StageLog, read_log
from pipeline.errors import UserError
from pipeline.secrets import has_credentials, redacted
from pipeline.storage import Location
from pipeline.training.model import _pretrained_config
from tests.pipeline.preprocess_data import make_lines, write_lines

ROOT = Path(__file__).resolve().parents[2]
SECRET = "wJalrXUtnFEMI-K7MDENG"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"s3://AKIA:{SECRET}@bucket/runs?region=x", "s3://***@bucket/runs?region=x"),
        (f"cannot open 's3://AKIA:{SECRET}@b/x'", "cannot open 's3://***@b/x'"),
        (f"abfs://c@a/x?client_secret={SECRET}&tenant_id=5", "abfs://***@a/x?client_secret=***&"),
        (f"https://h/x?sig={SECRET}", "https://h/x?sig=***"),
        ("mail a@b.c, s3://bucket/with@sign.txt", "mail a@b.c, s3://bucket/with@sign.txt"),
        ("loss 2.5 at step 3", "loss 2.5 at step 3"),
    ],
)
def test_redacted_hides_credentials_of_uris_alone(text: str, clean: str) -> None:
    assert redacted(text).startswith(clean)
    assert SECRET not in redacted(text)
    assert has_credentials(text) == (SECRET in text)


def test_record_and_log_of_a_stage_hold_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + SECRET)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/token-file")
    folder = Location.parse(tmp_path)
    spec = {"corpus": {"train": f"s3://AKIA:{SECRET}@bucket/a.txt", "more": ["hf_" + SECRET]}}
    Artifact(
        folder, "preprocess", "0", spec, {}, "failed", "now", error=f"hf_{SECRET} is refused"
    ).save()
    log = StageLog(folder)
    log.write(f"reading s3://AKIA:{SECRET}@bucket/a.txt with hf_{SECRET}; /home/me/token-file")
    assert SECRET not in (tmp_path / "artifact.json").read_text()
    assert SECRET not in read_log(folder)
    assert "/home/me/token-file" in read_log(folder)
    assert Artifact.load(folder).spec["corpus"]["more"] == ["***"]


def test_job_whose_corpus_uri_holds_a_key_says_so_without_it(tmp_path: Path) -> None:
    command = [
        sys.executable, "jobs/preprocess.py", "corpus=text",
        f"corpus.train='s4://AKIA:{SECRET}@bucket/x'", "tokenizer=bpe", f"storage={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "s4://***@bucket/x" in done.stderr
    assert SECRET not in done.stdout + done.stderr


def test_chain_on_a_storage_with_a_key_is_refused(tmp_path: Path) -> None:
    command = [
        sys.executable, "jobs/run.py", "job=demo", f"storage='s3://AKIA:{SECRET}@bucket/runs'",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "AWS_SECRET_ACCESS_KEY" in done.stderr
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/x", "..", "", "a\\..\\x", "a\0b", "train/.."]
)
def test_location_name_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="is no name below"):
        Location.parse(tmp_path) / name


def test_location_names_within_are_taken(tmp_path: Path) -> None:
    for name in ("a", "train/part-0.parquet", "a..b", ".hidden", "…"):
        assert (Location.parse(tmp_path) / name).path == f"{tmp_path}/{name}"


def test_manifest_that_names_a_file_outside_is_refused(tmp_path: Path) -> None:
    from pipeline.shards import Dataset
    from tests.pipeline.preprocess_data import make_spec, write_dataset

    spec = make_spec({"train": write_lines(tmp_path / "a.txt", make_lines(50))})
    write_dataset(spec, tmp_path / "out")
    file = tmp_path / "out" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest.pop("checksum", None)
    manifest["splits"]["train"]["parts"][0]["file"] = "../../outside.parquet"
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is no name below"):
        Dataset.open(Location.parse(tmp_path / "out")).split("train").read_row_group(0)


@pytest.mark.parametrize("stage", ["../../evil", "/tmp/evil"])
def test_job_stage_with_a_name_of_a_path_writes_nothing_outside(tmp_path: Path, stage: str) -> None:
    storage = tmp_path / "storage"
    job = tmp_path / "evil.yaml"
    source = write_lines(tmp_path / "a.txt", make_lines(30))
    job.write_text(
        f"name: '../../evil'\nstages:\n  '{stage}':\n    run: '{stage}'\n    corpus: text\n"
        f"    corpus.train: {source}\n"
    )
    before = set(tmp_path.rglob("*"))
    command = [sys.executable, "jobs/run.py", f"job={job}", f"storage={storage}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "is not a stage" in done.stderr
    assert set(tmp_path.rglob("*")) == before
    assert not Path("/tmp/evil").exists()


def test_backbone_with_code_of_its_own_is_not_run(tmp_path: Path) -> None:
    from pipeline.training.model import Vocabulary

    folder, touched = tmp_path / "backbone", tmp_path / "touched"
    folder.mkdir()
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(
        f"from pathlib import Path\nPath({str(touched)!r}).touch()\n"
        "from transformers import PreTrainedConfig\n"
        "class MineConfig(PreTrainedConfig):\n    model_type = 'mine'\n"
    )
    vocabulary = Vocabulary(10, 10, 0, 1, 2)
    with pytest.raises(UserError, match="cannot be read"):
        _pretrained_config(str(folder), vocabulary, trust_remote_code=False)
    assert not touched.exists()
    os.environ.setdefault("HF_HOME", str(tmp_path))
    with pytest.raises((UserError, AttributeError, TypeError)):  # it runs, but has no vocabulary
        _pretrained_config(str(folder), vocabulary, trust_remote_code=True)
    assert touched.exists()
