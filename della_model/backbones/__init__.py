"""One adapter for each family of pretrained decoders, by transformers' `model_type`."""

from della_model.backbones.base import BackboneAdapter
from della_model.backbones.gpt2 import GPT2Adapter

BACKBONES: dict[str, BackboneAdapter] = {"gpt2": GPT2Adapter()}

__all__ = ["BACKBONES", "BackboneAdapter"]
