"""Standard errors of figures over texts or documents."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.noise import generator

_RESAMPLES = 200
_SEED = 0xB007

Pair = tuple[float | None, float | None]  # a figure and its standard error


def mean(values: NDArray[np.float64]) -> Pair:
    """Mean, and its standard error; of one value there is none."""
    count = len(values)
    if count == 0:
        return None, None
    center = float(values.sum() / count)
    if count < 2:
        return center, None
    deviations = float(np.square(values - center).sum())
    return center, math.sqrt(deviations / (count - 1) / count)


def perplexity(nll: NDArray[np.float64], units: NDArray[np.int64]) -> Pair:
    """exp(Σ nll / Σ units), and its standard error over documents.

    The error is the delta method's for a ratio of two means, then for the exponential: documents
    are what was drawn, so both sums vary with them.
    """
    count, total = len(nll), int(units.sum())
    if total == 0:
        return None, None
    rate = float(nll.sum()) / total
    try:
        value = math.exp(rate)
    except OverflowError:
        return None, None
    if count < 2:
        return value, None
    residuals = float(np.square(nll - rate * units).sum())
    rate_error = math.sqrt(residuals / (count - 1) / count) / (total / count)
    return value, value * rate_error


def bootstrap(rows: NDArray[np.int64], figure: Callable[[NDArray[np.int64]], float]) -> Pair:
    """A figure of all rows, and its standard deviation over resamples of the rows.

    For figures that are a function of a sum over texts, such as BLEU. The resamples are the same in
    every run.
    """
    value = figure(rows)
    if len(rows) < 2:
        return value, None
    random = generator(_SEED, len(rows))
    draws = random.integers(0, len(rows), (_RESAMPLES, len(rows)))
    return value, float(np.std([figure(rows[draw]) for draw in draws], ddof=1))
