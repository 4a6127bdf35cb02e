"""Batches of documents, read from a text or drawn at random, for the benchmarks of the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Tokenizer

VOCAB_SIZE = 50257
END_OF_TEXT = VOCAB_SIZE - 1

Batch = tuple[Tensor, Tensor]  # token ids and mask, [documents, time] each


def documents_of(text: Path | None, tokenizer: Path | None) -> list[Tensor]:
    """Token ids of a text's lines, at most 20,000; of random ones without a text.

    Random lengths are log-normal with mean near 27 tokens: like sentences of news text.
    """
    if text is None or tokenizer is None:
        lengths = torch.empty(20_000).log_normal_(mean=3.2, std=0.5).long().clamp(4, 200)
        return [torch.randint(VOCAB_SIZE, (int(length),)) for length in lengths]
    lines = [line.strip() for line in text.open(encoding="utf-8")][:20_000]
    encoded = GPT2Tokenizer.from_pretrained(tokenizer)([line for line in lines if line])
    return [torch.tensor([END_OF_TEXT, *ids, END_OF_TEXT]) for ids in encoded["input_ids"]]


def bucketed(documents: Sequence[Tensor], tokens: int, count: int) -> list[Batch]:
    """Batches of about `tokens` tokens from all over the lengths, in random order."""
    documents = sorted(documents, key=len)
    batches = []
    for start in torch.linspace(0.1, 0.9, count).mul(len(documents)).long():
        chosen: list[Tensor] = []
        while sum(map(len, chosen)) < tokens and start + len(chosen) < len(documents):
            chosen.append(documents[start + len(chosen)])
        batches.append(padded(chosen))
    return [batches[i] for i in torch.randperm(count)]


def padded(documents: Sequence[Tensor]) -> Batch:
    """The documents as one batch, padded at the right to the longest of them."""
    input_ids = pad_sequence(list(documents), batch_first=True, padding_value=END_OF_TEXT)
    lengths = torch.tensor([len(document) for document in documents])
    mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    return input_ids, mask.long()
