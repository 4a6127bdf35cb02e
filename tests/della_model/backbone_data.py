"""A tiny configuration for every family of backbones. Sizes differ, so that swapped axes show."""

from typing import Any

from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
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
}  # fmt: skip
