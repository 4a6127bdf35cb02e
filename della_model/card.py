"""The card of a model: what it is, what it was trained on, and how well it does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from della_model.config import DellaConfig

_USE = """```python
from transformers import AutoTokenizer
from della_model import Della

model, tokenizer = Della.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")
print(model.sample(4))
print(model.reconstruct(["..."]))
```"""


def model_card(
    name: str,
    config: DellaConfig,
    manifest: Mapping[str, Any] | None = None,
    figures: Mapping[str, Any] | None = None,
) -> str:
    """A model card in Markdown.

    Args:
        name: of the model, as `from_pretrained` takes it.
        config: the model's.
        manifest: the `manifest.json` of the dataset that it was trained on.
        figures: of its evaluation; the numbers among them are shown.
    """
    backbone = config.backbone
    layers = config.latent_layer_indices
    where = f"decoder layers {layers[0]} to {layers[-1]}" if layers else "no layer"
    parts = [
        "---\nlibrary_name: transformers\ntags: [della, variational-autoencoder, text-generation]"
        "\n---",
        f"# {name}",
        "A DELLA, a variational Transformer for text with latent variables "
        "([Hu et al., NAACL 2022](https://arxiv.org/abs/2207.06130)).",
        _USE.format(name=name),
        "## Model",
        _table(
            {
                "backbone": f"{backbone.model_type}, {backbone.num_hidden_layers} layers of "
                f"{backbone.hidden_size}, vocabulary {backbone.vocab_size:,}",
                "latents": f"{config.latents}: {config.num_latent_layers} of size "
                f"{config.latent_size}, in {where}",
                "fusion": f"{config.fusion} (rank {config.fusion_rank})",
                "encoder": f"{config.encoder}, pooling {config.pooling}",
            }
        ),
    ]
    if figures:
        numbers = {k: f"{v:,.4g}" for k, v in figures.items() if _is_number(v)}
        parts += ["## Figures", "Nats a document, unless the name says else.", _table(numbers)]
    if manifest:
        shown = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False, default=str)
        parts += ["## Data", f"```json\n{shown}\n```"]
    parts += ["## Configuration", f"```json\n{config.to_json_string(use_diff=True).strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])
