"""A tiny configuration for every family of backbones. Sizes differ, so that swapped axes show."""

from typing import Any

from transformers import (
    BartConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

BOS, EOS = 1, 2
_IDS: dict[str, Any] = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
# Two key-value heads of 6 for four query heads: values are 12 wide, queries 24, hidden states 20.
_LLAMA: dict[str, Any] = {
    "vocab_size": 53,
    "max_position_embeddings": 29,
    "num_hidden_layers": 3,
    "hidden_size": 20,
    "intermediate_size": 34,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "initializer_range": 0.2,
    **_IDS,
}
_QWEN2 = {k: v for k, v in _LLAMA.items() if k != "head_dim"}  # 20 / 4 would be odd

FAMILIES: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=53, n_positions=29, n_layer=3, n_embd=22, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2, **_IDS,
    ),
    "llama": LlamaConfig(**_LLAMA),
    "mistral": MistralConfig(**_LLAMA, sliding_window=3),
    "qwen2": Qwen2Config(**_QWEN2 | {"hidden_size": 24}, tie_word_embeddings=True),
    "qwen3": Qwen3Config(
        **_LLAMA, use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    # The encoders are of another depth than the decoders.
    "bart": BartConfig(
        vocab_size=53, max_position_embeddings=29, encoder_layers=2, decoder_layers=3, d_model=22,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=34,
        decoder_ffn_dim=38, dropout=0.0, init_std=0.2, **_IDS,
    ),
    "t5": T5Config(
        vocab_size=53, d_model=20, d_kv=6, d_ff=34, num_layers=4, num_decoder_layers=3,
        num_heads=4, dropout_rate=0.0, n_positions=29, eos_token_id=EOS, pad_token_id=0,
        relative_attention_num_buckets=8, relative_attention_max_distance=12,
    ),
    "t5 v1.1": T5Config(
        vocab_size=53, d_model=20, d_kv=6, d_ff=34, num_layers=3, num_heads=4, dropout_rate=0.0,
        n_positions=29, eos_token_id=EOS, pad_token_id=0, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
}  # fmt: skip
