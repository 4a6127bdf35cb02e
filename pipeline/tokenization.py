"""Tokenizers: trained on a corpus, loaded, named by content; and the encoder of documents.

Every tokenizer here ends up as a folder that transformers' `AutoTokenizer` loads, with BOS, EOS
and padding set. Padding is always masked, so it may share EOS's id.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.artifact import digest
from pipeline.environment import environment_variable
from pipeline.errors import UserError, first_line
from pipeline.shards import Documents
from pipeline.specs import TokenizerSpec
from pipeline.storage import Location

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
GPT2_SPECIAL = "<|endoftext|>"
GPT2_FILES = ("vocab.json", "merges.txt")
# Texts encoded at a time: the library's results for more of them outgrow the processor's caches.
_TEXTS_AT_ONCE = 2048
# Words whose pieces a BPE remembers. The library's own 10,000 are fewer than a corpus has.
_CACHED_WORDS = 1 << 17
_TOKENIZER_FILES = (
    *GPT2_FILES,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)


@dataclass(frozen=True)
class SpecialIds:
    """The ids that frame a document, and the one that fills up a batch."""

    bos: int
    eos: int
    pad: int


class Encoder:
    """Turns texts into documents: BOS, the text's tokens, EOS.

    Text that spells a special token ("<|endoftext|>" in a crawled page) is encoded as text, and
    never truncated. Whether several threads work is decided by TOKENIZERS_PARALLELISM.

    Args:
        backend: a `tokenizers.Tokenizer`; a copy is kept.
        special: the ids that frame a document.
    """

    def __init__(self, backend: Tokenizer, special: SpecialIds) -> None:
        self.special = special
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        if hasattr(self._backend.model, "_resize_cache"):
            self._backend.model._resize_cache(_CACHED_WORDS)

    def encode(self, texts: Sequence[str]) -> Documents:
        """Encode each text; the result has one document a text, in order."""
        ids: list[list[int]] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            # The fast form leaves out the offsets of tokens in the text.
            encoded = self._backend.encode_batch_fast(
                texts[start : start + _TEXTS_AT_ONCE], add_special_tokens=False
            )
            ids += [encoding.ids for encoding in encoded]
        lengths = np.fromiter(map(len, ids), np.int64, count=len(ids)) + 2
        offsets = np.zeros(len(ids) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        values = np.empty(int(offsets[-1]), np.int32)
        values[offsets[:-1]] = self.special.bos
        values[offsets[1:] - 1] = self.special.eos
        is_text = np.ones(len(values), bool)
        is_text[offsets[:-1]] = is_text[offsets[1:] - 1] = False
        values[is_text] = np.fromiter(
            chain.from_iterable(ids), np.int32, count=int(lengths.sum()) - 2 * len(ids)
        )
        return Documents(values, offsets)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of one document's ids, without special tokens."""
        text: str = self._backend.decode(list(map(int, ids)), skip_special_tokens=True)
        return text


def encoder_of(tokenizer: Any) -> Encoder:
    """The encoder of a transformers tokenizer."""
    return Encoder(backend_of(tokenizer), special_ids(tokenizer))


def backend_of(tokenizer: Any) -> Tokenizer:
    """The `tokenizers.Tokenizer` inside a transformers tokenizer.

    Raises:
        UserError: if it is one of the slow tokenizers, which have none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(
            f"the tokenizer {type(tokenizer).__name__} has no fast form (tokenizer.json), which "
            "preprocess needs: convert it with transformers, or use another."
        )
    return backend


def special_ids(tokenizer: Any) -> SpecialIds:
    """BOS, EOS and padding of a transformers tokenizer.

    Tokenizers without a BOS (Qwen, GPT-2's family) begin documents with EOS, those of BERT's
    family begin with [CLS] and end with [SEP]; padding without a token of its own is EOS.

    Raises:
        UserError: if nothing can end a document.
    """

    def first(*names: str) -> int | None:
        ids = (getattr(tokenizer, f"{name}_token_id", None) for name in names)
        return next((token_id for token_id in ids if token_id is not None), None)

    eos = first("eos", "sep", "bos")
    if eos is None:
        raise UserError(
            "the tokenizer has no EOS token, so nothing could end a document: set eos_token in "
            "its tokenizer_config.json, or use another tokenizer."
        )
    bos, pad = first("bos", "cls"), first("pad")
    return SpecialIds(eos if bos is None else bos, eos, eos if pad is None else pad)


def vocabulary_size(tokenizer: Any) -> int:
    """Rows that an embedding needs: the highest id, plus one."""
    return max(backend_of(tokenizer).get_vocab(with_added_tokens=True).values()) + 1


def ordinary_size(tokenizer: Any) -> int:
    """Rows of an embedding that ordinary tokens need: special ones behind them are left out."""
    backend = backend_of(tokenizer)
    special = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
    vocabulary = backend.get_vocab(with_added_tokens=True).values()
    return max((id for id in vocabulary if id not in special), default=-1) + 1


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Name a transformers tokenizer by what it turns text into; sha256 in hex.

    It derives from vocabulary, merges, normalisation, pre-tokenization, added tokens and the ids
    that frame a document: what decides the content of shards. Padding, truncation, the decoder,
    the post-processor (never used here), class names and paths are left out, so that a tokenizer
    saved again elsewhere keeps its name.
    """
    content = json.loads(backend_of(tokenizer).to_str())
    # Left out or empty is the same: who builds a tokenizer decides which of the two is written.
    model = {key: value for key, value in content["model"].items() if value}
    special = special_ids(tokenizer)
    return digest(
        {
            "model": model,
            "normalizer": content["normalizer"],
            "pre_tokenizer": content["pre_tokenizer"],
            "added_tokens": sorted([t["id"], t["content"]] for t in content["added_tokens"]),
            "bos": special.bos,
            "eos": special.eos,
        }
    )


def load_tokenizer(folder: Location | str | os.PathLike[str]) -> Any:
    """Load the tokenizer that lies in a folder (a dataset's `tokenizer/`, or beside weights).

    Raises:
        UserError: if the folder holds no tokenizer.
    """
    location = folder if isinstance(folder, Location) else Location.parse(folder)
    if not (location / "tokenizer.json").is_file():
        raise UserError(
            f"{location} holds no tokenizer.json: expected a dataset's tokenizer/ folder or a "
            "folder of weights saved with their tokenizer; check the path."
        )
    if location.is_local:
        return _from_pretrained(location.path)
    with tempfile.TemporaryDirectory() as scratch:
        for name in _TOKENIZER_FILES:
            if (location / name).is_file():
                (Path(scratch) / name).write_bytes((location / name).read_bytes())
        return _from_pretrained(scratch)


def _from_pretrained(folder: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    try:
        # The generic class takes tokenizer.json as it is; a class named by a model may not.
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the Rust side raises bare Exception
        raise UserError(
            f"the tokenizer in {folder} cannot be read ({first_line(error)}): a file there is "
            "damaged or was edited; restore it, or run preprocess again."
        ) from None


def load_gpt2(folder: Location, special: Mapping[str, str] | None = None) -> Any:
    """Build GPT-2's tokenizer from `vocab.json` and `merges.txt`.

    Raises:
        UserError: if a file is missing or broken, or the vocabulary lacks <|endoftext|>.
    """
    missing = [name for name in GPT2_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"tokenizer.path={folder} holds no {' and no '.join(missing)}: tokenizer=gpt2 needs a "
            "folder with both vocab.json and merges.txt; check the path, or use tokenizer=hf."
        )
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / name for name in GPT2_FILES]
        for path in paths:
            path.write_bytes((folder / path.name).read_bytes())
        try:
            backend = Tokenizer(models.BPE.from_file(str(paths[0]), str(paths[1])))
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(
                f"vocab.json and merges.txt in {folder} cannot be read as a byte-level BPE "
                f"({first_line(error)}): one of them is damaged, or they do not belong together; "
                "fetch both again."
            ) from None
    if backend.token_to_id(GPT2_SPECIAL) is None:
        raise UserError(
            f"{folder / 'vocab.json'} has no token {GPT2_SPECIAL}, with which tokenizer=gpt2 "
            "begins and ends documents: use tokenizer=hf for another kind of tokenizer."
        )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _wrap_with(backend, [GPT2_SPECIAL] * 3, special)


def load_hf(
    path: str, special: Mapping[str, str] | None = None, trust_remote_code: bool = False
) -> Any:
    """Load a tokenizer of a folder or hub id by `AutoTokenizer`.

    Code that lies beside it is run only with `trust_remote_code`.

    `special` names tokens for `bos`, `eos` and `pad` that take the place of its own; those that it
    has not get the next ids.

    Raises:
        UserError: if there is none, it has no fast form, or nothing ends a document.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(
            f"tokenizer.path={path} gives no tokenizer ({first_line(error)}): expected a folder "
            "with tokenizer.json, or the id of a model on the Hugging Face hub that this machine "
            "can reach."
        ) from None
    backend = backend_of(loaded)
    if special and "eos" in special:
        loaded.eos_token = special["eos"]  # what it lacks is no error when it is given
        backend.add_special_tokens([special["eos"]])
    own = special_ids(loaded)
    names = [str(backend.id_to_token(i)) for i in (own.bos, own.eos, own.pad)]
    return _wrap_with(backend, names, special)


def _wrap_with(backend: Tokenizer, own: list[str], special: Mapping[str, str] | None) -> Any:
    """With the tokenizer's own BOS, EOS and padding, but for those that are given."""
    chosen = dict(zip(("bos", "eos", "pad"), own, strict=True)) | dict(special or {})
    backend.add_special_tokens(list(chosen.values()))  # those that are there keep their ids
    return _wrap(backend, chosen["bos"], chosen["eos"], chosen["pad"])


def _wrap(backend: Tokenizer, bos: str, eos: str, pad: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad
    )


def train_bpe(texts: Iterable[Sequence[str]], vocab_size: int) -> Any:
    """Train a byte-level BPE; any text can be encoded with it, so there is no unknown token.

    Args:
        texts: lists of texts, streamed: memory grows with the distinct words, not with the texts.
        vocab_size: tokens wanted, special ones among them; a small corpus may give fewer.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with rust_threads(True):
        backend.train_from_iterator(texts, trainer)
    return _wrap(backend, BOS, EOS, PAD)


@contextmanager
def rust_threads(on: bool) -> Iterator[None]:
    """Let the tokenizers library use all cores, or one, while the body runs."""
    with environment_variable("TOKENIZERS_PARALLELISM", "true" if on else "false"):
        yield


def fingerprint_files(folder: Location) -> str:
    """Name a tokenizer's folder by the content of its tokenizer files, without loading it.

    Raises:
        UserError: if the folder is not there or holds no tokenizer file.
    """
    found = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in _TOKENIZER_FILES
        if (folder / name).is_file()
    }
    if not found:
        raise UserError(
            f"tokenizer.path={folder} holds no tokenizer: expected a folder with tokenizer.json, "
            "or with vocab.json and merges.txt; check the path."
        )
    return digest(found)


def fingerprint_source(tokenizer: TokenizerSpec) -> str:
    """Name a tokenizer that is loaded by its content."""
    path = str(tokenizer.path)
    folder = Location.parse(path)
    if tokenizer.kind == "gpt2" or folder.exists():
        return fingerprint_files(folder)
    return fingerprint_tokenizer(
        load_hf(path, trust_remote_code=tokenizer.trust_remote_code)
    )  # a hub id
