"""A model on a hub: its card (what it is, what it was trained on, how well it does), its upload."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from della_model.config import DellaConfig

_USE = """```python
from della_model import Della

model = Della.from_pretrained("{name}").eval()
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
                "backbone": f"{backbone.model_type}, {config.num_layers} layers of "
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


class HubInterface:
    """`Della`'s way to a hub. A base of `Della`, which each `self` is."""

    def save_for_hub(
        self: Any,
        folder: str | PathLike[str],
        name: str,
        manifest: Mapping[str, Any] | None = None,
        figures: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes weights, tokenizer and a model card, README.md, as a hub shows them."""
        self.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        card = model_card(name, self.config, manifest, figures)
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")

    def push_to_hub(
        self: Any,
        repo_id: str,
        *,
        manifest: Mapping[str, Any] | None = None,
        figures: Mapping[str, Any] | None = None,
        private: bool | None = None,
        token: str | None = None,
        **upload: Any,
    ) -> Any:
        """Uploads what `save_for_hub` writes; `upload` goes to huggingface_hub's upload_folder."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_for_hub(folder, repo_id, manifest, figures)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **upload)
