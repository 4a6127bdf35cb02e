"""Figures that need further models: tiny ones, with random weights; packages where installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.errors import UserError
from pipeline.evaluation.metrics.extras import ReferenceModel, bertscore, mauve
from pipeline.storage import Location
from pipeline.tokenization import train_bpe
from tests.pipeline.train_data import sentences


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal language model with its tokenizer."""
    where = tmp_path_factory.mktemp("reference")
    tokenizer = train_bpe([sentences(200)], 300)
    tokenizer.save_pretrained(where)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300,
        n_positions=64,
        n_layer=2,
        n_embd=32,
        n_head=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(where)
    return where


def test_reference_model_gives_the_models_own_loss(folder: Path) -> None:
    from transformers import AutoTokenizer

    texts = ["the dog runs.", "", "a cat"]
    found = ReferenceModel(Location.parse(folder), "cpu").figures(texts)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        GPT2LMHeadModel.from_pretrained(folder),
    )
    for text, nll, count in zip(texts, found["nll"], found["num_tokens"], strict=True):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        assert count == ids.shape[1] - 1
        if count:
            with torch.no_grad():
                loss = model(ids, labels=ids).loss.item()
            assert nll == pytest.approx(loss * count, rel=1e-5)
        else:
            assert nll == 0


def test_folder_without_a_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reference_model=.*cannot be loaded"):
        ReferenceModel(Location.parse(tmp_path), "cpu")


def test_mauve_prefers_texts_like_the_references(folder: Path) -> None:
    pytest.importorskip("mauve", reason="the extra 'mauve' is not installed")
    like, other = sentences(40, 1), ["zz qq zz"] * 40
    references = sentences(40, 2)
    assert mauve(like, references, str(folder)) > mauve(other, references, str(folder))


def test_bertscore_of_copies_is_one(folder: Path) -> None:
    pytest.importorskip("bert_score", reason="the extra 'bertscore' is not installed")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = sorted({w for text in sentences(200) for w in text.replace(".", " .").split()})
    (folder / "bert").mkdir()
    vocabulary = folder / "bert" / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(vocab_file=str(vocabulary)).save_pretrained(folder / "bert")
    config = BertConfig(
        vocab_size=len(words) + 5,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=37,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder / "bert")
    texts, others = sentences(4, 1), sentences(4, 2)
    np.testing.assert_allclose(bertscore(texts, texts, str(folder / "bert"), None), 1, atol=1e-5)
    assert bertscore(texts, others, str(folder / "bert"), 1).mean() < 0.999
