"""Figures that need a further model, and for some of them a further package."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UserError, first_line
from pipeline.evaluation.blocks import Arrays
from pipeline.specs.evaluate import EvaluationSpec

if TYPE_CHECKING:
    from pipeline.storage import Location

# A judge is read, never run: its family is one that transformers itself knows.
_NO_CODE: dict[str, Any] = {"trust_remote_code": False}
# Setting -> the package that it needs, by import name and by the name to install.
_PACKAGES = {
    "mauve_model": ("mauve", "mauve-text"),
    "bertscore_model": ("bert_score", "bert-score"),
}


def require_extras(settings: EvaluationSpec) -> None:
    """Check that what the asked-for figures need is installed.

    Raises:
        UserError: naming the package and the command that installs it.
    """
    for key, (module, package) in _PACKAGES.items():
        if getattr(settings, key) is not None and find_spec(module) is None:
            raise UserError(
                f"evaluate.{key} is set, but its figure needs the package {package}, which is not "
                f"installed: install it with 'pip install -c constraints.txt {package}', or leave "
                f"evaluate.{key} out."
            )


class ReferenceModel:
    """A causal language model of transformers, by which texts are judged.

    Args:
        folder: a `from_pretrained` folder with its tokenizer.
        device: where it computes.

    Raises:
        UserError: if the folder holds no causal language model.
    """

    def __init__(self, folder: Location, device: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from pipeline.weights import local_folder

        path = local_folder(folder)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, **_NO_CODE)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **_NO_CODE)
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise UserError(
                f"evaluate.reference_model={folder} cannot be loaded ({reason}): expected a folder "
                "with a causal language model of transformers and its tokenizer; check the path."
            ) from None
        self._model = model.to(device).eval()
        self._longest = getattr(model.config, "max_position_embeddings", None)

    def figures(self, texts: Sequence[str]) -> Arrays:
        """Of each text: −log p under the model in nats, and how many tokens that is.

        Each text stands alone behind the model's first token; whether it ends there is not asked,
        for a language model of running text seldom ends a sentence's document.
        """
        import torch

        start = self._tokenizer.bos_token_id
        if start is None:
            start = self._tokenizer.eos_token_id
        nll, counts = [], []
        for text in texts:
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = ([] if start is None else [start]) + ids
            ids = torch.tensor([ids[: self._longest]], device=self._model.device)
            if ids.shape[1] < 2:  # nothing is predicted
                nll.append(0.0)
                counts.append(0)
                continue
            with torch.inference_mode():
                logits = self._model(ids).logits[0, :-1].double()
            picked = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])
            nll.append(-float(picked.sum()))
            counts.append(ids.shape[1] - 1)
        return {"nll": np.array(nll), "num_tokens": np.array(counts, np.int64)}


def mauve(texts: Sequence[str], references: Sequence[str], model: str) -> float:
    """MAUVE (Pillutla et al. 2021) of texts against references, in (0, 1]; higher is closer."""
    import mauve as package

    result: Any = package.compute_mauve(
        p_features=_text_features(references, model),
        q_features=_text_features(texts, model),
        device_id=-1,
        verbose=False,
    )
    return float(result.mauve)


def _text_features(texts: Sequence[str], folder: str) -> np.ndarray:
    """Hidden state of each text's last token after the last layer, as MAUVE's authors take it.

    By our own hand, because the package only knows models by their names on the hub.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, **_NO_CODE)
    model = AutoModel.from_pretrained(folder, **_NO_CODE)
    model = model.eval()
    longest = getattr(model.config, "max_position_embeddings", None)
    # An empty text has no last token: the tokenizer's end stands for it.
    empty = [tokenizer.eos_token_id or 0]
    rows = []
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(text)["input_ids"][:longest] or empty
            hidden = model(torch.tensor([ids])).last_hidden_state
            rows.append(hidden[0, -1].float().numpy())
    return np.stack(rows)


def bertscore(
    texts: Sequence[str], references: Sequence[str], model: str, layer: int | None
) -> np.ndarray:
    """BERTScore F1 (Zhang et al. 2020) of each text against its reference."""
    from bert_score import BERTScorer
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, **_NO_CODE)
    scorer = BERTScorer(model_type=model, num_layers=layer or config.num_hidden_layers)
    # A tokenizer that was saved without a bound has 1e30, which tokenizers refuse.
    tokenizer = scorer._tokenizer
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    _, _, f1 = scorer.score(list(texts), list(references))
    values: np.ndarray = f1.double().numpy()
    return values
