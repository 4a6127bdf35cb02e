"""Texts in, texts out: what one does with a trained model at a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from della_model.condition import Condition, Reading
from della_model.errors import InputError
from della_model.gaussian import DiagonalGaussian
from della_model.shapes import Float


@dataclass(frozen=True)
class EncodedTexts:
    """Texts as the model sees them through its latents.

    Attributes:
        latents: [documents, L, p], the chain run on posterior means; what `decode` takes.
        posteriors: q(z_l | z_<l, x) of each latent by the name of its decoder layer, "layer_0" and
            so on, or "all_layers" where one latent enters them all; [documents, p] each.
    """

    latents: Float[Tensor, "documents layers latent"]
    posteriors: dict[str, DiagonalGaussian]


def interpolated(
    a: Float[Tensor, "layers latent"], b: Float[Tensor, "layers latent"], steps: int
) -> Float[Tensor, "steps layers latent"]:
    """Latents on the straight line from `a` to `b`, both included, at equal distances."""
    if steps < 2:
        raise InputError(
            f"steps: expected at least 2, the two ends, got {steps}: nothing lies between fewer."
        )
    share = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device)[:, None, None]
    return a + share * (b - a)


def analogous(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """c + (b − a): what is to c as b is to a."""
    return c + (b - a)


def _repeated(source: str | None, times: int) -> list[str] | None:
    return None if source is None else [source] * times


class TextInterface:
    """`Della`'s methods on texts. The tokenizer is the one beside the loaded weights.

    A base of `Della`, which each `self` is; typed `Any`, for a base cannot know what it becomes.
    """

    _tokenizer: Any = None

    @property
    def tokenizer(self: Any) -> Any:
        """The tokenizer beside the weights; may be set.

        Raises InputError where the model was not loaded from a folder that has one.
        """
        if self._tokenizer is None:
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(
                    self.config._name_or_path, trust_remote_code=False
                )
            except (OSError, ValueError, TypeError) as error:
                raise InputError(
                    f"texts: expected a tokenizer beside the weights in "
                    f"{self.config._name_or_path or 'no folder'!r}, got none: texts cannot be "
                    "turned into tokens; set model.tokenizer, or load a folder that training wrote."
                ) from error
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @torch.no_grad()
    def encode(
        self: Any, texts: Sequence[str], *, sources: Sequence[str] | None = None
    ) -> EncodedTexts:
        """Named posteriors of texts, a layer each, and the latents at their means.

        `sources`: of a conditional model, the source of each text.
        """
        reading = self._reading(sources, len(texts))
        input_ids, attention_mask = self._framed(texts)
        noise = torch.zeros_like(self.draw_noise(len(texts)))
        sample = self.infer(input_ids, attention_mask, noise, reading)
        config = self.config
        names = [f"layer_{layer}" for layer in config.feature_layers]
        if config.latents == "single":
            names = ["all_layers"]
        return EncodedTexts(sample.latents, dict(zip(names, sample.posteriors, strict=True)))

    def decode(
        self: Any,
        latents: EncodedTexts | Float[Tensor, "documents layers latent"],
        max_new_tokens: int = 64,
        *,
        sources: Sequence[str] | None = None,
        **options: Any,
    ) -> list[str]:
        """A text for each document's latents; greedy unless `options` of `generate` say else.

        `sources`: of a conditional model, the source of each document.
        """
        given = latents.latents if isinstance(latents, EncodedTexts) else latents
        reading = self._reading(sources, len(given))
        room = min(max_new_tokens, self._room_after(reading))
        options = {"do_sample": False, "max_new_tokens": room, **options}
        ids = self.generate(latents=given, condition=reading, **options)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def sample(
        self: Any,
        n: int = 1,
        *,
        sources: Sequence[str] | None = None,
        temperature: float = 1.0,
        seed: int | None = None,
        **options: Any,
    ) -> list[str]:
        """`n` texts from the prior: z ~ p(z), then x ~ p(x | z); with a seed, the same ones.

        Of a conditional model, `n` texts for each of `sources`, one source after the other: from
        p(z | c) and p(x | z, c).
        """
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        each = None if sources is None else [source for source in sources for _ in range(n)]
        count = n if each is None else len(each)
        with torch.no_grad():
            reading = self._reading(each, count)
            latents = self.sample_prior(count, generator=generator, condition=reading)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            options = {"do_sample": True, "temperature": temperature, **options}
            return self.decode(latents, sources=each, **options)

    def reconstruct(
        self: Any, texts: Sequence[str], *, sources: Sequence[str] | None = None, **options: Any
    ) -> list[str]:
        """What texts become through their posterior means."""
        return self.decode(self.encode(texts, sources=sources), sources=sources, **options)

    def interpolate(
        self: Any, a: str, b: str, steps: int = 8, *, source: str | None = None, **options: Any
    ) -> list[str]:
        """Texts along the straight line between two texts' latents, both ends included.

        `source`: of a conditional model, the one that all of them are texts of.
        """
        start, end = self.encode([a, b], sources=_repeated(source, 2)).latents
        path = interpolated(start, end, steps)
        return self.decode(path, sources=_repeated(source, steps), **options)

    def analogy(
        self: Any, a: str, b: str, c: str, *, source: str | None = None, **options: Any
    ) -> str:
        """The text that is to `c` as `b` is to `a`; `source` as for `interpolate`."""
        latents = self.encode([a, b, c], sources=_repeated(source, 3)).latents
        found = analogous(*latents).unsqueeze(0)
        return self.decode(found, sources=_repeated(source, 1), **options)[0]

    @torch.no_grad()
    def _reading(self: Any, sources: Sequence[str] | None, count: int) -> Reading | None:
        """What the model keeps of as many sources as there are texts; None where it has none."""
        if sources is None and not self.config.conditional:
            return None
        if sources is None or not self.config.conditional:
            expected, got = ("one a text", "none") if sources is None else ("none", "some")
            raise InputError(
                f"sources: expected {expected}, got {got}: this model "
                f"{'generates from sources' if sources is None else 'knows no sources'}; "
                f"{'pass sources=[…]' if sources is None else 'leave them out'}."
            )
        if len(sources) != count:
            raise InputError(
                f"sources: expected {count}, one for each text, got {len(sources)}: each text has "
                "a source of its own; repeat one that serves several."
            )
        return self.read(Condition(*self._framed(sources, "sources")))

    def _room_after(self: Any, reading: Reading | None) -> int:
        """The most tokens that a text can have behind BOS and what stands before it."""
        context: int = self.config.context
        if reading is None or reading.states is not None:
            return context
        longest = int(reading.condition.attention_mask.sum(-1).max())
        if longest >= context:
            raise InputError(
                f"sources: expected at most {context - 1} tokens with BOS and EOS, got {longest}: "
                f"the backbone's {context} positions leave no room for a text; shorten the source."
            )
        return context - longest

    def _framed(self: Any, texts: Sequence[str], name: str = "texts") -> tuple[Tensor, Tensor]:
        """Token ids and mask of texts, each from BOS to EOS, padded on the right."""
        if isinstance(texts, str) or not texts or not all(text.strip() for text in texts):
            raise InputError(
                f"{name}: expected a list of texts, none of them empty, got {texts!r}: each is a "
                "document of its own; pass [text] for a single one."
            )
        # Text that spells a special token is text.
        rows = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
        ends = self.generation_config.eos_token_id
        eos = ends[0] if isinstance(ends, list) else ends
        bos = self._beginnings(1).item()
        rows = [[bos, *ids, *([] if eos is None else [eos])] for ids in rows["input_ids"]]
        input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
        return input_ids.to(self.device), attention_mask.to(self.device)
