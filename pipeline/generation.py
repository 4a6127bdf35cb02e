"""Texts out of a model: sentences from the prior, reconstructions through the posterior.

All is deterministic by seed: the latents and the tokens of a document depend on the seed and its
place alone, not on which documents share its batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.batches import pad_right
from pipeline.errors import UserError
from pipeline.noise import Purpose, Stream, document_noise, document_uniforms
from pipeline.specs.generate import GenerateSpec
from pipeline.storage import Location
from pipeline.tokenization import encoder_of, special_ids

if TYPE_CHECKING:
    import torch

    from della_model import Della, DellaConfig, Reading

BATCH_SIZE = 32


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    `temperature=0` or several beams search the likeliest text; else tokens are drawn from the
    `top_k` likeliest (0: all) within probability mass `top_p`.
    """

    max_tokens: int = 64  # new ones at most, EOS among them; the model's context ends it too
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1

    @property
    def draws(self) -> bool:
        """Whether chance has a part in it."""
        return self.temperature > 0 and self.num_beams == 1

    def options(self, context: int, seed: int, documents: Iterable[int]) -> dict[str, Any]:
        """Arguments of transformers' `generate`; `context` is the model's longest document.

        Where tokens are drawn, each of `documents` draws by numbers of its own, keyed on the seed
        and its place.
        """
        longest = min(self.max_tokens, context - 1)
        chosen: dict[str, Any] = {
            "max_new_tokens": longest,
            "num_beams": self.num_beams,
            "do_sample": False,
        }
        if self.draws:
            from pipeline.sampling import DocumentSampler

            numbers = document_uniforms(Stream(seed, Purpose.TOKENS), documents, longest)
            sampler = DocumentSampler(numbers, self.temperature, self.top_k, self.top_p)
            chosen["logits_processor"] = [sampler]
        return chosen


def sample_texts(
    model: Della,
    tokenizer: Any,
    num: int,
    seed: int,
    decoding: Decoding,
    batch_size: int = BATCH_SIZE,
    first: int = 0,
) -> list[str]:
    """Texts `first` to `first + num` of the prior's: z ~ p(z), then x from p(x | z)."""
    import torch

    shape = (model.config.num_latent_layers, model.config.latent_size)
    prior = Stream(seed, Purpose.PRIOR)
    texts: list[str] = []
    for start in range(first, first + num, batch_size):
        places = range(start, min(start + batch_size, first + num))
        noise = torch.from_numpy(document_noise(prior, places, shape))
        latents = model.sample_prior(noise=noise.to(model.device))
        texts += decode_latents(model, tokenizer, latents, decoding, seed, places)
    return texts


def reconstruct_texts(
    model: Della,
    tokenizer: Any,
    texts: Sequence[str],
    seed: int,
    decoding: Decoding,
    latents: Literal["mean", "sample"] = "mean",
    batch_size: int = BATCH_SIZE,
) -> list[str]:
    """As `reconstruct_documents`, from raw texts.

    Raises:
        UserError: if a text is empty, or longer than the model's context.
    """
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise UserError(
                f"text {number} is empty: expected a document on every line, for nothing could be "
                "reconstructed from none; delete the line."
            )
    documents = list(encoder_of(tokenizer).encode(texts))
    context = model.config.context
    for number, document in enumerate(documents, start=1):
        if len(document) > context:
            raise UserError(
                f"text {number} has {len(document)} tokens with BOS and EOS, but the model's "
                f"context is {context}: it cannot be encoded whole; shorten or split it."
            )
    return reconstruct_documents(model, tokenizer, documents, seed, decoding, latents, batch_size)


def reconstruct_documents(
    model: Della,
    tokenizer: Any,
    documents: Sequence[NDArray[np.int32]],
    seed: int,
    decoding: Decoding,
    latents: Literal["mean", "sample"] = "mean",
    batch_size: int = BATCH_SIZE,
) -> list[str]:
    """Texts that documents become through their latents: z from q(z | x), then x from p(x | z).

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        documents: token ids, from BOS to EOS.
        seed: names the draws, where there are any.
        decoding: how tokens are chosen.
        latents: "mean" runs the chain on posterior means, "sample" draws.
        batch_size: documents decoded at once.
    """
    import torch

    shape = (model.config.num_latent_layers, model.config.latent_size)
    posterior = Stream(seed, Purpose.RECONSTRUCTION)
    texts: list[str] = []
    for first in range(0, len(documents), batch_size):
        batch = documents[first : first + batch_size]
        places = range(first, first + len(batch))
        noise = torch.from_numpy(document_noise(posterior, places, shape))
        if latents == "mean":
            noise = torch.zeros_like(noise)
        input_ids, mask = (tensor.to(model.device) for tensor in pad_right(batch, 0))
        with torch.inference_mode():
            inferred = model.infer(input_ids, mask, noise.to(model.device)).latents
        texts += decode_latents(model, tokenizer, inferred, decoding, seed, places)
    return texts


def texts_for_sources(
    model: Della,
    tokenizer: Any,
    sources: Sequence[str],
    seed: int,
    decoding: Decoding,
    batch_size: int = BATCH_SIZE,
) -> list[str]:
    """A text for each source c, by a conditional model: z ~ p(z | c), then x from p(x | z, c).

    Raises:
        UserError: if the model knows no sources, or one is longer than its context.
    """
    check_mode("target", model.config)
    documents = list(encoder_of(tokenizer).encode(sources))
    # A decoder-only model has the source before the text, which needs a place for BOS at least.
    room = model.config.context - (0 if model.config.adapter.is_encoder_decoder else 2)
    for number, document in enumerate(documents, start=1):
        if len(document) > room:
            raise UserError(
                f"source {number} has {len(document)} tokens with BOS and EOS, but the model's "
                f"context leaves room for {room}: it cannot be read whole; shorten it."
            )
    texts: list[str] = []
    for first in range(0, len(documents), batch_size):
        batch = documents[first : first + batch_size]
        numbers = range(first, first + len(batch))
        texts += target_texts(model, tokenizer, batch, seed, decoding, numbers)
    return texts


def target_texts(
    model: Della,
    tokenizer: Any,
    sources: Sequence[NDArray[np.int32]],
    seed: int,
    decoding: Decoding,
    numbers: Iterable[int],
) -> list[str]:
    """As `texts_for_sources`, of token ids, all at once; `numbers` name what is drawn for each."""
    import torch

    from della_model import Condition

    numbers = list(numbers)
    shape = (model.config.num_latent_layers, model.config.latent_size)
    noise = torch.from_numpy(document_noise(Stream(seed, Purpose.PRIOR), numbers, shape))
    ids, mask = (tensor.to(model.device) for tensor in pad_right(sources, 0))
    with torch.inference_mode():
        condition = model.read(Condition(ids, mask))
        latents = model.sample_prior(noise=noise.to(model.device), condition=condition)
    return decode_latents(model, tokenizer, latents, decoding, seed, numbers, condition)


def decode_latents(
    model: Della,
    tokenizer: Any,
    latents: torch.Tensor,
    decoding: Decoding,
    seed: int,
    places: Iterable[int],
    condition: Reading | None = None,
) -> list[str]:
    """Texts under latents [documents, layers, latent]; `places` name the numbers they draw by.

    Of a conditional model, `condition` is what `model.read` gave of the documents' sources.
    """
    import torch

    context = model.config.context
    if condition is not None and condition.states is None:
        context -= int(condition.condition.attention_mask.sum(-1).max())
    special = special_ids(tokenizer)
    start = torch.full((len(latents), 1), special.bos, device=model.device)
    found = model.generate(
        start,
        latents=latents,
        condition=condition,
        eos_token_id=special.eos,
        pad_token_id=special.pad,
        **decoding.options(context, seed, places),
    )
    encoder = encoder_of(tokenizer)
    return [encoder.decode(ids).strip() for ids in found[:, 1:].tolist()]


def check_mode(mode: str, config: DellaConfig) -> None:
    """Check that a model can generate in a mode.

    Raises:
        UserError: if it cannot.
    """
    if mode == "target" and not config.conditional:
        raise UserError(
            "mode=target needs a model that was trained on sources with their targets, and these "
            "weights were not: its texts depend on no source; use mode=sample."
        )
    if mode != "target" and config.conditional:
        raise UserError(
            f"mode={mode} needs a model of texts alone, and these weights were trained on sources "
            "with their targets: no text comes without a source; use mode=target input=SOURCES, or "
            "from Python model.reconstruct(texts, sources=…)."
        )
    if mode in ("reconstruct", "interpolate", "analogy") and not config.num_latent_layers:
        raise UserError(
            f"mode={mode} needs a model with latents, and these weights have none "
            "(model.latents=none): nothing of a given text would reach its output; use mode=sample "
            "or mode=complete."
        )


def run_generate(spec: GenerateSpec, weights: Location) -> list[dict[str, str]]:
    """Generate what the spec asks for, a row a text, by the names of what they are.

    Raises:
        UserError: if the weights or the input cannot be used.
    """
    from pipeline.weights import load_model, load_weights_tokenizer

    texts = read_texts(Location.parse(spec.input)) if spec.input is not None else []
    tokenizer = load_weights_tokenizer(weights)
    model = load_model(weights, _device(spec.device))
    check_mode(spec.mode, model.config)
    from_prior = spec.mode in ("sample", "complete", "target")
    default = 1.0 if from_prior and spec.num_beams == 1 else 0.0
    decoding = Decoding(
        max_tokens=spec.max_tokens,
        temperature=default if spec.temperature is None else spec.temperature,
        top_k=spec.top_k,
        top_p=spec.top_p,
        num_beams=spec.num_beams,
    )
    if spec.mode == "sample":
        samples = sample_texts(model, tokenizer, spec.num, spec.seed, decoding, spec.batch_size)
        return [{"sample": text} for text in samples]
    if spec.mode == "target":
        targets = texts_for_sources(model, tokenizer, texts, spec.seed, decoding, spec.batch_size)
        pairs = zip(texts, targets, strict=True)
        return [{"source": source, "target": text} for source, text in pairs]
    if spec.mode in ("interpolate", "analogy", "complete"):
        return _walked(spec, model, tokenizer, texts, decoding)
    rebuilt = reconstruct_texts(
        model, tokenizer, texts, spec.seed, decoding, spec.latents, spec.batch_size
    )
    pairs = zip(texts, rebuilt, strict=True)
    return [{"source": source, "reconstruction": text} for source, text in pairs]


def _walked(
    spec: GenerateSpec, model: Della, tokenizer: Any, lines: Sequence[str], decoding: Decoding
) -> list[dict[str, str]]:
    from pipeline.walks import analogous_text, completed_texts, interpolated_texts

    if spec.mode == "complete":
        found = completed_texts(model, tokenizer, lines, spec.seed, decoding)
        return [
            {"prefix": prefix, "completion": text}
            for prefix, text in zip(lines, found, strict=True)
        ]
    rows: list[dict[str, str]] = []
    for number, line in enumerate(lines, start=1):
        texts = _columns(line, number, 2 if spec.mode == "interpolate" else 3)
        if spec.mode == "analogy":
            a, b, c = texts
            text = analogous_text(model, tokenizer, a, b, c, spec.seed, decoding)
            rows.append({"a": a, "b": b, "c": c, "analogy": text})
            continue
        start, end = texts
        path = interpolated_texts(model, tokenizer, start, end, spec.steps, spec.seed, decoding)
        steps = {f"step {step}": text for step, text in enumerate(path, start=1)}
        rows.append({"from": start, **steps, "to": end})
    return rows


def _columns(line: str, number: int, count: int) -> list[str]:
    texts = [text.strip() for text in line.split("\t")]
    if len(texts) != count or not all(texts):
        raise UserError(
            f"input, line {number}, has {len(texts)} texts: expected {count} with a tab between "
            "them; the mode compares that many, so correct the line."
        )
    return texts


def read_texts(file: Location) -> list[str]:
    """Read a text file, a document a line.

    Raises:
        UserError: if it is missing, empty, not UTF-8, or has an empty line.
    """
    if not file.is_file():
        raise UserError(
            f"input={file} is not there: expected a text file, a document a line; check the path."
        )
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"input={file}, line {line}, is not UTF-8 ({error.reason}): its characters would be "
            "guesses; convert the file to UTF-8."
        ) from None
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    empty = next((number for number, line in enumerate(lines, start=1) if not line), None)
    if empty is not None:
        what = "is empty" if len(lines) == 1 else f"has nothing in line {empty}"
        raise UserError(
            f"input={file} {what}: expected a document on every line, for nothing could be "
            "reconstructed from none; delete the empty lines."
        )
    return lines


def _device(name: str) -> str:
    import torch

    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if available else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = "unknown"
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not available):
        there = "cpu, cuda" if available else "cpu"
        raise UserError(f"device={name} is not there: expected auto or one of {there}.")
    return name
