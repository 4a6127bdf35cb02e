"""What the preprocess stage does: which corpus, which tokenizer, how it is sharded."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.specs.base import NotIdentity, Spec
from pipeline.specs.cluster import ClusterSpec

CorpusKind = Literal["text", "jsonl", "parquet", "csv", "hf", "python_docs"]
_KINDS_WITH_SOURCES = ("jsonl", "parquet", "hf")


class CorpusSpec(Spec):
    """Where the documents come from.

    `train`, `valid` and `test` are each a file, a folder or a glob, local or a URI. When only
    `train` is given, documents are split by the hash of their text.
    """

    kind: CorpusKind
    # Paths are not identity: the content of the files is an input with a fingerprint of its own.
    train: Annotated[str | None, NotIdentity] = None
    valid: Annotated[str | None, NotIdentity] = None
    test: Annotated[str | None, NotIdentity] = None
    # kind=hf: a folder written by `save_to_disk`, a data set script's folder, or a hub id.
    path: Annotated[str | None, NotIdentity] = None
    name: str | None = None
    revision: str | None = None
    text_field: str = "text"
    # Conditional data (source → target): the field that the document of `text_field` is to be
    # generated from.
    source_field: str | None = None
    valid_fraction: float = Field(0.05, ge=0, lt=1)
    test_fraction: float = Field(0.05, ge=0, lt=1)
    # Share of documents that may be rejected before the run stops and says so.
    max_rejected: Annotated[float, NotIdentity] = Field(0.01, ge=0, le=1)
    # Longer documents go to rejected/: in bytes of UTF-8, and in tokens with BOS and EOS.
    max_document_bytes: int = Field(1_000_000, gt=0)
    max_tokens: int | None = Field(None, gt=2)
    max_source_tokens: int | None = Field(None, gt=2)

    @property
    def text_fields(self) -> tuple[str, ...]:
        """The fields that hold text: the document's, and its source's where there is one."""
        return (self.text_field,) + ((self.source_field,) if self.source_field else ())

    @model_validator(mode="after")
    def _can_have_sources(self) -> Self:
        if self.source_field is not None and self.kind not in _KINDS_WITH_SOURCES:
            raise ValueError(
                f"corpus.source_field={self.source_field} needs a corpus whose documents have "
                f"fields: corpus is one of {', '.join(_KINDS_WITH_SOURCES)}, not {self.kind}"
            )
        if self.source_field is not None and self.source_field == self.text_field:
            raise ValueError(
                f"corpus.source_field and corpus.text_field are both '{self.text_field}': the "
                "document would be given as its own source; name the field of the target in "
                "corpus.text_field"
            )
        if self.source_field is None and self.max_source_tokens is not None:
            raise ValueError("corpus.max_source_tokens is for data with a corpus.source_field")
        return self

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if self.kind == "hf" and self.path is None:
            raise ValueError("corpus=hf needs corpus.path=FOLDER_OR_HUB_ID, and none was given")
        if self.kind not in ("hf", "python_docs") and self.train is None:
            raise ValueError(
                f"corpus={self.kind} needs corpus.train=FILE_FOLDER_OR_GLOB, and none was given"
            )
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError(
                "corpus.valid_fraction + corpus.test_fraction must leave documents to train on, "
                f"but they add up to {self.valid_fraction + self.test_fraction:g}"
            )
        return self


class TokenizerSpec(Spec):
    """The tokenizer: trained on the training split (`bpe`), or loaded."""

    kind: Literal["bpe", "gpt2", "hf"]
    vocab_size: int | None = Field(None, ge=260)
    # kind=gpt2: a folder with vocab.json and merges.txt; kind=hf: a folder or hub id.
    path: Annotated[str | None, NotIdentity] = None
    # kind=hf: run Python code that lies beside the tokenizer, where it needs its own.
    trust_remote_code: Annotated[bool, NotIdentity] = False
    # Special tokens of a loaded tokenizer, added where it lacks them; None: its own.
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None

    @property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens that are asked for, by `bos`, `eos` and `pad`."""
        asked = {"bos": self.bos_token, "eos": self.eos_token, "pad": self.pad_token}
        return {name: token for name, token in asked.items() if token is not None}

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        if self.kind == "bpe" and self.vocab_size is None:
            raise ValueError("tokenizer=bpe needs tokenizer.vocab_size=N, and none was given")
        if self.kind != "bpe" and self.path is None:
            what = (
                "a folder or hub id"
                if self.kind == "hf"
                else "vocab.json's and merges.txt's folder"
            )
            raise ValueError(f"tokenizer={self.kind} needs tokenizer.path, {what}; none was given")
        if self.kind != "bpe" and self.vocab_size is not None:
            raise ValueError(
                f"tokenizer.vocab_size is for tokenizer=bpe; tokenizer={self.kind} brings its own"
            )
        if self.kind != "hf" and self.trust_remote_code:
            raise ValueError(
                "tokenizer.trust_remote_code is for tokenizer=hf, which alone may bring code"
            )
        if self.kind == "bpe" and self.special_tokens:
            raise ValueError(
                "tokenizer.bos_token, eos_token and pad_token are for a tokenizer that is loaded; "
                "tokenizer=bpe has its own"
            )
        return self


class PreprocessSpec(Spec):
    """One run of the preprocess stage."""

    corpus: CorpusSpec
    tokenizer: TokenizerSpec
    # Raw bytes that one task turns into one shard: the unit of parallel work and of a re-run.
    shard_bytes: int = Field(16_000_000, ge=1_000)
    cluster: Annotated[ClusterSpec, NotIdentity] = ClusterSpec()
