"""Figures of single documents: what a block of the evaluation yields, and how blocks join."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.storage import Location

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations over documents, for each latent dimension."""

    count: int
    mean: Floats  # [layers, latent]
    squares: Floats  # [layers, latent]

    @classmethod
    def of(cls, values: Floats) -> Moments:
        """Moments of `values` [documents, layers, latent] over the documents."""
        mean = values.mean(axis=0)
        return cls(len(values), mean, np.square(values - mean).sum(axis=0))

    def join(self, other: Moments) -> Moments:
        """Moments of both sets together (Chan, Golub and LeVeque's update: no cancellation)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = np.square(shift) * (self.count * other.count / count)
        return Moments(count, mean, self.squares + other.squares + between)

    @property
    def variance(self) -> Floats:
        """Unbiased variance over the documents, [layers, latent]; zero for one document."""
        return self.squares / max(self.count - 1, 1)


@dataclass(frozen=True)
class DocumentFigures:
    """Figures of consecutive documents, in float64; nats, summed over a document's tokens."""

    reconstruction_nll: Floats  # [documents], −log p(x|z) of one draw of z
    kl_per_layer: Floats  # [documents, layers], along that draw's chain
    iw_nll: Floats  # [documents]
    num_predicted: Integers  # [documents]: tokens without BOS, with EOS
    num_words: Integers  # [documents]: words of the raw text
    posterior_means: Moments

    @property
    def num_documents(self) -> int:
        """How many documents these are."""
        return len(self.iw_nll)

    def save(self, file: Location) -> None:
        """Write the figures of one block, atomically."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != _MOMENTS}
        moments = self.posterior_means
        buffer = io.BytesIO()
        np.savez(
            buffer,
            allow_pickle=False,
            **arrays,
            moments_count=np.int64(moments.count),
            moments_mean=moments.mean,
            moments_squares=moments.squares,
        )
        file.write_bytes(buffer.getvalue())

    @classmethod
    def load(cls, file: Location) -> DocumentFigures:
        """Read what `save` wrote.

        Raises:
            UserError: if the file is damaged.
        """
        try:
            with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as found:
                moments = Moments(
                    int(found["moments_count"]), found["moments_mean"], found["moments_squares"]
                )
                arrays = {f.name: found[f.name] for f in fields(cls) if f.name != _MOMENTS}
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{file} should hold a finished block of an evaluation but cannot be read "
                f"({error}): it was damaged; delete it, and the same command computes it again."
            ) from None
        return cls(**arrays, posterior_means=moments)

    @classmethod
    def join(cls, parts: Sequence[DocumentFigures]) -> DocumentFigures:
        """Put blocks together, in the order given."""
        moments = parts[0].posterior_means
        for part in parts[1:]:
            moments = moments.join(part.posterior_means)
        arrays = {
            f.name: np.concatenate([getattr(part, f.name) for part in parts])
            for f in fields(cls)
            if f.name != _MOMENTS
        }
        return cls(**arrays, posterior_means=moments)

    def save_parquet(self, file: Location) -> None:
        """Write a row a document, in the split's order."""
        table = pa.table(
            {
                "document": np.arange(self.num_documents),
                "reconstruction_nll": self.reconstruction_nll,
                "kl": self.kl_per_layer.sum(axis=1),
                "kl_per_layer": pa.array(list(self.kl_per_layer), pa.list_(pa.float64())),
                "iw_nll": self.iw_nll,
                "num_predicted": self.num_predicted,
                "num_words": self.num_words,
            }
        )
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        file.write_bytes(buffer.getvalue())


_MOMENTS = "posterior_means"
