"""Tokenizers: the same content has the same name, and documents are framed by BOS and EOS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.errors import UserError
from pipeline.storage import Location
from pipeline.tokenization import (
    encoder_of,
    fingerprint_files,
    fingerprint_tokenizer,
    load_gpt2,
    load_hf,
    load_tokenizer,
    special_ids,
    train_bpe,
    vocabulary_size,
)
from tests.pipeline.preprocess_data import make_lines

TEXTS = ["plain words", "", "  spaces  ", "Grüße 猫 🙂", "<eos><bos> <|endoftext|>", "a\nb\tc"]


@pytest.fixture(scope="module")
def bpe() -> Any:
    return train_bpe([make_lines(300)], 340)


@pytest.fixture
def gpt2_folder(tmp_path: Path, bpe: Any) -> Path:
    """A small vocabulary in GPT-2's two files."""
    model = json.loads(bpe.backend_tokenizer.to_str())["model"]
    vocabulary = [t for t in model["vocab"] if t not in ("<bos>", "<eos>", "<pad>")]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    ids = {token: i for i, token in enumerate([*vocabulary, "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(ids))
    merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    return folder


def test_encoder_frames_each_document_and_decodes_to_the_text(bpe: Any) -> None:
    encoder = encoder_of(bpe)
    documents = encoder.encode(TEXTS)
    assert documents.values.dtype == np.int32
    plain = bpe.backend_tokenizer
    plain.encode_special_tokens = True
    for text, ids in zip(TEXTS, documents, strict=True):
        assert ids.tolist() == [0, *plain.encode(text, add_special_tokens=False).ids, 1]
        assert encoder.decode(ids) == text
    assert documents.lengths.tolist() == [len(d) for d in documents]


def test_encoder_spelled_special_tokens_are_text(bpe: Any) -> None:
    (document,) = encoder_of(bpe).encode(["<eos><bos><pad>"])
    assert not {0, 1, 2} & set(document[1:-1].tolist())


def test_encoder_of_no_texts_is_empty(bpe: Any) -> None:
    documents = encoder_of(bpe).encode([])
    assert len(documents) == 0
    assert documents.values.size == 0


def test_train_bpe_does_not_depend_on_how_texts_arrive(bpe: Any) -> None:
    lines = make_lines(300)
    again = train_bpe((lines[i : i + 7] for i in range(0, 300, 7)), 340)
    assert fingerprint_tokenizer(again) == fingerprint_tokenizer(bpe)
    assert vocabulary_size(bpe) == 340
    assert special_ids(bpe).__dict__ == {"bos": 0, "eos": 1, "pad": 2}
    assert fingerprint_tokenizer(train_bpe([lines], 341)) != fingerprint_tokenizer(bpe)


def test_fingerprint_is_the_same_after_saving_anywhere(tmp_path: Path, bpe: Any) -> None:
    name = fingerprint_tokenizer(bpe)
    bpe.save_pretrained(tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    assert fingerprint_tokenizer(loaded) == name
    loaded.save_pretrained(tmp_path / "b" / "weights")
    assert fingerprint_tokenizer(load_tokenizer(Location.parse(tmp_path / "b/weights"))) == name
    automatic = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert fingerprint_tokenizer(automatic) == name
    assert (automatic.bos_token_id, automatic.eos_token_id, automatic.pad_token_id) == (0, 1, 2)
    loaded.backend_tokenizer.enable_truncation(8)
    loaded.backend_tokenizer.enable_padding()
    assert fingerprint_tokenizer(loaded) == name


def test_load_tokenizer_from_a_remote_folder_gives_the_same(tmp_path: Path, bpe: Any) -> None:
    bpe.save_pretrained(tmp_path)
    remote = Location(Location.parse(tmp_path).filesystem, str(tmp_path), "mock")
    assert fingerprint_tokenizer(load_tokenizer(remote)) == fingerprint_tokenizer(bpe)


def test_load_gpt2_begins_ends_and_pads_with_one_token(gpt2_folder: Path) -> None:
    loaded = load_gpt2(Location.parse(gpt2_folder))
    size = len(json.loads((gpt2_folder / "vocab.json").read_text()))
    assert vocabulary_size(loaded) == len(loaded) == size, "padding added nothing"
    assert set(special_ids(loaded).__dict__.values()) == {size - 1}
    for text, ids in zip(TEXTS, encoder_of(loaded).encode(TEXTS), strict=True):
        assert encoder_of(loaded).decode(ids) == text


def test_load_gpt2_equals_transformers_own(gpt2_folder: Path) -> None:
    (gpt2_folder / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = AutoTokenizer.from_pretrained(gpt2_folder)
    ours = load_gpt2(Location.parse(gpt2_folder))
    assert fingerprint_tokenizer(theirs) == fingerprint_tokenizer(ours)
    for text in TEXTS[:4]:
        assert encoder_of(ours).encode([text])[0][1:-1].tolist() == theirs(text).input_ids


def test_fingerprint_files_follows_content(gpt2_folder: Path) -> None:
    before = fingerprint_files(Location.parse(gpt2_folder))
    (gpt2_folder / "model.safetensors").write_bytes(b"weights are no part of a tokenizer")
    assert fingerprint_files(Location.parse(gpt2_folder)) == before
    with (gpt2_folder / "merges.txt").open("a") as file:
        file.write("\n")
    assert fingerprint_files(Location.parse(gpt2_folder)) != before


def _break(folder: Path, how: str) -> None:
    if how in ("vocab.json", "merges.txt"):
        (folder / how).unlink()
    elif how == "damaged":
        (folder / "vocab.json").write_text('{"a": 1')
    else:
        ids = json.loads((folder / "vocab.json").read_text())
        del ids["<|endoftext|>"]
        (folder / "vocab.json").write_text(json.dumps(ids))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("vocab.json", "holds no vocab.json"),
        ("merges.txt", "holds no merges.txt"),
        ("damaged", "cannot be read as a byte-level BPE"),
        ("no end", r"no token <\|endoftext\|>"),
    ],
)
def test_load_gpt2_incomplete_folder_is_one_sentence(
    gpt2_folder: Path, how: str, says: str
) -> None:
    _break(gpt2_folder, how)
    with pytest.raises(UserError, match=says) as caught:
        load_gpt2(Location.parse(gpt2_folder))
    assert "\n" not in caught.value.message


def test_load_tokenizer_missing_or_damaged_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer"):
        fingerprint_files(Location.parse(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="gives no tokenizer"):
        load_hf(str(tmp_path))


def _words(**special: str) -> Any:
    vocabulary = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "<end>": 3, "a": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)


@pytest.mark.parametrize(
    ("special", "ids"),
    [
        ({"eos_token": "<end>"}, (3, 3, 3)),
        ({"cls_token": "[CLS]", "sep_token": "[SEP]"}, (0, 1, 1)),
    ],
)
def test_load_hf_without_bos_or_padding_uses_what_there_is(
    tmp_path: Path, special: dict[str, str], ids: tuple[int, int, int]
) -> None:
    _words(**special).save_pretrained(tmp_path)
    found = special_ids(load_hf(str(tmp_path)))
    assert (found.bos, found.eos, found.pad) == ids


def test_load_hf_without_an_end_is_refused(tmp_path: Path) -> None:
    _words().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no EOS token"):
        load_hf(str(tmp_path))
