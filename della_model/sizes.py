"""Backbone configurations by the name of a size."""

from __future__ import annotations

from typing import NamedTuple

from transformers import GPT2Config

from della_model.errors import ConfigError, unknown_name


class Size(NamedTuple):
    """Depth, width and heads of a backbone."""

    num_layers: int
    hidden_size: int
    num_heads: int


# `tiny` and `small` train from scratch in minutes on two CPU cores; the others are the published
# GPT-2 sizes (Radford et al. 2019), so that published weights fit them.
SIZES: dict[str, Size] = {
    "tiny": Size(4, 128, 4),
    "small": Size(6, 256, 8),
    "gpt2": Size(12, 768, 12),
    "gpt2-medium": Size(24, 1024, 16),
    "gpt2-large": Size(36, 1280, 20),
    "gpt2-xl": Size(48, 1600, 25),
}


def gpt2_config(
    size: str,
    vocab_size: int,
    *,
    n_positions: int = 1024,
    dropout: float = 0.1,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> GPT2Config:
    """A GPT-2 of a named size; `dropout` is used everywhere (embeddings, attention, residual).

    Raises ConfigError for an unknown size, naming the nearest, and for numbers out of range.
    """
    if size not in SIZES:
        raise ConfigError(unknown_name("size", size, SIZES))
    for name, value in (("vocab_size", vocab_size), ("n_positions", n_positions)):
        if value < 1:
            raise ConfigError(f"{name}: expected a whole number ≥ 1, got {value}.")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout: expected a number in [0, 1), got {dropout}.")
    num_layers, hidden_size, num_heads = SIZES[size]
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=n_positions,
        n_layer=num_layers,
        n_embd=hidden_size,
        n_head=num_heads,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
