"""Texts from latents of given texts: between two, by analogy, and texts that begin as told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.batches import pad_right
from pipeline.errors import UserError
from pipeline.generation import Decoding, decode_latents
from pipeline.noise import Purpose, Stream, document_noise
from pipeline.tokenization import encoder_of, special_ids

if TYPE_CHECKING:
    import torch

    from della_model import Della


def interpolated_texts(
    model: Della, tokenizer: Any, a: str, b: str, steps: int, seed: int, decoding: Decoding
) -> list[str]:
    """Texts on the straight line between two texts' posterior means, both ends included."""
    from della_model.texts import interpolated

    start, end = posterior_means(model, tokenizer, [a, b])
    latents = interpolated(start, end, steps)
    return decode_latents(model, tokenizer, latents, decoding, seed, range(steps))


def analogous_text(
    model: Della, tokenizer: Any, a: str, b: str, c: str, seed: int, decoding: Decoding
) -> str:
    """The text that is to `c` as `b` is to `a`."""
    from della_model.texts import analogous

    latents = analogous(*posterior_means(model, tokenizer, [a, b, c])).unsqueeze(0)
    return decode_latents(model, tokenizer, latents, decoding, seed, [0])[0]


def completed_texts(
    model: Della, tokenizer: Any, prefixes: Sequence[str], seed: int, decoding: Decoding
) -> list[str]:
    """Each prefix with what follows it under latents from the prior.

    Raises:
        UserError: if a prefix leaves no room in the model's context.
    """
    import torch

    encoder, special = encoder_of(tokenizer), special_ids(tokenizer)
    shape = (model.config.num_latent_layers, model.config.latent_size)
    texts: list[str] = []
    for number, document in enumerate(encoder.encode(prefixes)):
        begun = torch.from_numpy(document[:-1].astype("int64"))[None].to(model.device)
        room = model.config.context - begun.shape[1]
        if room < 1:
            raise UserError(
                f"text {number + 1} has {begun.shape[1]} tokens with BOS, but the model's context "
                f"is {model.config.context}: nothing could follow it; shorten it."
            )
        noise = document_noise(Stream(seed, Purpose.PRIOR), [number], shape)
        found = model.generate(
            begun,
            latents=model.sample_prior(noise=torch.from_numpy(noise).to(model.device)),
            eos_token_id=special.eos,
            pad_token_id=special.pad,
            **decoding.options(room + 1, seed, [number]),
        )
        texts.append(encoder.decode(found[0, 1:].tolist()).strip())
    return texts


def posterior_means(model: Della, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Latents of texts, [texts, layers, latent]: the chain run on posterior means.

    Raises:
        UserError: if a text is longer than the model's context.
    """
    import torch

    documents = list(encoder_of(tokenizer).encode(texts))
    longest = max(map(len, documents))
    if longest > model.config.context:
        raise UserError(
            f"a text has {longest} tokens with BOS and EOS, but the model's context is "
            f"{model.config.context}: it cannot be encoded whole; shorten it."
        )
    input_ids, mask = (tensor.to(model.device) for tensor in pad_right(documents, 0))
    with torch.inference_mode():
        return model.infer(input_ids, mask, torch.zeros_like(model.draw_noise(len(texts)))).latents
