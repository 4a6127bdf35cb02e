"""How latents enter the decoder: the paper's tensor product, and the baselines' ways.

`FUSIONS` maps a name of the configuration to an `Entry`, which says where latents enter. A place
inside every layer (values, memory) gets a module a layer; one outside the layers (embeddings,
output) gets one module that sees all latents of a document.
"""

from __future__ import annotations

from dataclasses import dataclass

from della_model.fusion.addition import Shift, ValueShift
from della_model.fusion.base import Fusion, ValueFusion
from della_model.fusion.low_rank import LowRankTensorFusion
from della_model.fusion.memory import LatentMemory
from della_model.fusion.product import ProductFusion


@dataclass(frozen=True)
class Entry:
    """Where latents enter the decoder.

    Attributes:
        values: the module that changes the attention values of a layer under its latent.
        memory: a layer's latent is one more key and value of its attention.
        embeddings: a vector made from all latents is added to every input embedding.
        output: such a vector is added to every hidden state before the vocabulary head.
    """

    values: type[ValueFusion] | None = None
    memory: bool = False
    embeddings: bool = False
    output: bool = False


FUSIONS: dict[str, Entry] = {
    "low_rank": Entry(values=LowRankTensorFusion),
    "paper": Entry(values=ProductFusion),
    "add": Entry(values=ValueShift),
    "embed": Entry(embeddings=True),
    "memory": Entry(memory=True),
    "softmax": Entry(output=True),
    "embed+memory": Entry(embeddings=True, memory=True),
}

# Those that can do without the residual: a product with the values can take their place.
REPLACING_FUSIONS = ("low_rank", "paper")

__all__ = [
    "FUSIONS",
    "REPLACING_FUSIONS",
    "Entry",
    "Fusion",
    "LatentMemory",
    "LowRankTensorFusion",
    "ProductFusion",
    "Shift",
    "ValueFusion",
    "ValueShift",
]
