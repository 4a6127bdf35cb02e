"""Backbone configurations by the name of a size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

from transformers import BartConfig, GPT2Config, LlamaConfig, PreTrainedConfig, T5Config

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


def backbone_config(
    family: str,
    size: str,
    vocab_size: int,
    *,
    n_positions: int = 1024,
    dropout: float = 0.1,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> PreTrainedConfig:
    """A backbone of a named family and size, for training from scratch.

    Sizes are those of GPT-2; in every family a layer of one size has about as many parameters.
    `dropout` is used wherever the family has any.

    Raises ConfigError for an unknown family or size, naming the nearest, and for numbers out of
    range.
    """
    if family not in _FAMILIES:
        raise ConfigError(unknown_name("family", family, _FAMILIES))
    if size not in SIZES:
        raise ConfigError(unknown_name("size", size, SIZES))
    for name, value in (("vocab_size", vocab_size), ("n_positions", n_positions)):
        if value < 1:
            raise ConfigError(f"{name}: expected a whole number ≥ 1, got {value}.")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout: expected a number in [0, 1), got {dropout}.")
    # Some families never train the embedding of what pads, which must not be that of BOS or EOS.
    if pad_token_id in (bos_token_id, eos_token_id):
        pad_token_id = None
    return _FAMILIES[family](
        SIZES[size],
        n_positions,
        dropout,
        {
            "vocab_size": vocab_size,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
        },
    )


def gpt2_config(size: str, vocab_size: int, **options: Any) -> GPT2Config:
    """`backbone_config` of GPT-2's family."""
    return cast(GPT2Config, backbone_config("gpt2", size, vocab_size, **options))


def _gpt2(
    size: Size, n_positions: int, dropout: float, vocabulary: dict[str, Any]
) -> PreTrainedConfig:
    return GPT2Config(
        n_positions=n_positions,
        n_layer=size.num_layers,
        n_embd=size.hidden_size,
        n_head=size.num_heads,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        **vocabulary,
    )


def _llama(
    size: Size, n_positions: int, dropout: float, vocabulary: dict[str, Any]
) -> PreTrainedConfig:
    return LlamaConfig(
        max_position_embeddings=n_positions,
        num_hidden_layers=size.num_layers,
        hidden_size=size.hidden_size,
        # Three matrices of 8/3 the width are as much as two of four times the width.
        intermediate_size=-(-size.hidden_size * 8 // 3 // 8) * 8,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        attention_dropout=dropout,
        tie_word_embeddings=True,
        **vocabulary,
    )


def _bart(
    size: Size, n_positions: int, dropout: float, vocabulary: dict[str, Any]
) -> PreTrainedConfig:
    return BartConfig(
        max_position_embeddings=n_positions,
        d_model=size.hidden_size,
        encoder_layers=size.num_layers,
        decoder_layers=size.num_layers,
        encoder_attention_heads=size.num_heads,
        decoder_attention_heads=size.num_heads,
        encoder_ffn_dim=4 * size.hidden_size,
        decoder_ffn_dim=4 * size.hidden_size,
        dropout=dropout,
        attention_dropout=dropout,
        **vocabulary,
    )


def _t5(
    size: Size, n_positions: int, dropout: float, vocabulary: dict[str, Any]
) -> PreTrainedConfig:
    return T5Config(
        n_positions=n_positions,
        d_model=size.hidden_size,
        d_kv=size.hidden_size // size.num_heads,
        d_ff=4 * size.hidden_size,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        dropout_rate=dropout,
        **vocabulary,
    )


_FAMILIES: dict[str, Callable[[Size, int, float, dict[str, Any]], PreTrainedConfig]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "bart": _bart,
    "t5": _t5,
}
