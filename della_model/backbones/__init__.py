"""One adapter for each family of pretrained decoders, by transformers' `model_type`."""

from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from della_model.backbones.base import BackboneAdapter
from della_model.backbones.gpt2 import GPT2Adapter
from della_model.backbones.llama import LlamaAdapter

BACKBONES: dict[str, BackboneAdapter] = {
    "gpt2": GPT2Adapter(),
    "llama": LlamaAdapter(LlamaForCausalLM),
    "mistral": LlamaAdapter(MistralForCausalLM),
    "qwen2": LlamaAdapter(Qwen2ForCausalLM),
    "qwen3": LlamaAdapter(Qwen3ForCausalLM),
}

__all__ = ["BACKBONES", "BackboneAdapter"]
