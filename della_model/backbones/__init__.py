"""One adapter for each family of pretrained backbones, by transformers' `model_type`."""

from transformers import (
    BartForConditionalGeneration,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    T5ForConditionalGeneration,
)

from della_model.backbones.bart import BartAdapter
from della_model.backbones.base import BackboneAdapter
from della_model.backbones.gpt2 import GPT2Adapter
from della_model.backbones.llama import LlamaAdapter
from della_model.backbones.t5 import T5Adapter

BACKBONES: dict[str, BackboneAdapter] = {
    "gpt2": GPT2Adapter(GPT2LMHeadModel),
    "llama": LlamaAdapter(LlamaForCausalLM),
    "mistral": LlamaAdapter(MistralForCausalLM),
    "qwen2": LlamaAdapter(Qwen2ForCausalLM),
    "qwen3": LlamaAdapter(Qwen3ForCausalLM),
    "bart": BartAdapter(BartForConditionalGeneration),
    "t5": T5Adapter(T5ForConditionalGeneration),
}

__all__ = ["BACKBONES", "BackboneAdapter"]
