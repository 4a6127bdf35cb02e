"""What the generate job does: sentences from the prior, or from the latents of given ones."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.specs.base import Spec


class GenerateSpec(Spec):
    """One run of generation. Its input is weights; deterministic by `seed`."""

    mode: Literal["sample", "reconstruct", "interpolate", "analogy", "complete", "target"] = (
        "sample"
    )
    num: int = Field(8, gt=0)  # sample: how many sentences
    # A text file. reconstruct: a document a line; interpolate: two a line, with a tab between them;
    # analogy: three (a is to b as c is to what?); complete: a beginning a line; target: a source.
    input: str | None = None
    steps: int = Field(8, ge=2)  # interpolate: texts of one line, both ends included
    seed: int = Field(0, ge=0)
    batch_size: int = Field(32, gt=0)  # documents generated at once
    max_tokens: int = Field(64, gt=0)  # new tokens at most, the end-of-text token among them
    # Sampling is from the top_k likeliest tokens (0: all) within probability mass top_p. With
    # temperature=0 or num_beams above 1 nothing is drawn: the likeliest text is searched.
    # None: texts under a prior's latents are drawn, those under a given text's are greedy.
    temperature: float | None = Field(None, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    num_beams: int = Field(1, gt=0)
    # reconstruct: decode from the posterior's mean, or from a draw.
    latents: Literal["mean", "sample"] = "mean"
    device: str = "auto"  # "auto": a GPU when there is one

    @model_validator(mode="after")
    def _reconstruction_has_an_input(self) -> Self:
        if self.mode != "sample" and self.input is None:
            raise ValueError(
                f"mode={self.mode} needs input=FILE, a text file with a document a line, and none "
                "was given"
            )
        if self.mode == "sample" and self.input is not None:
            raise ValueError("input=FILE is for the other modes; mode=sample draws from the prior")
        if self.num_beams > 1 and self.temperature:
            raise ValueError(
                "num_beams above 1 searches the likeliest text and temperature draws: give one"
            )
        return self
