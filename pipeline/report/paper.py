"""What the literature reports on a corpus, and by which convention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Corpus = Literal["yelp", "yahoo", "ptb", "snli"]

PRINTED = "as printed: KL and importance weights averaged over layers, no bounds"
VALID = "valid bounds: summed over layers and tokens"
OURS_AVERAGED = "the printed convention, on our weights: no bounds"


@dataclass(frozen=True)
class Printed:
    """One row of a table of Hu et al. 2022 (arXiv 2207.06130), as printed; None: not printed."""

    name: str
    ppl: float
    negative_elbo: float | None = None
    kl: float | None = None
    mutual_information: float | None = None
    active_units: float | None = None


# DELLA's own row, and the perplexity of the best of its baselines in the same table.
TABLES: dict[Corpus, tuple[Printed, ...]] = {
    "yelp": (
        Printed("DELLA", 12.35, 239.83, 29.47, 10.78, 23),
        Printed("the table's best baseline", 19.95),
    ),
    "yahoo": (
        Printed("DELLA", 11.49, 201.34, 27.84, 12.31, 21),
        Printed("the table's best baseline", 22.03),
    ),
    "ptb": (
        Printed("DELLA", 10.28, 58.43, 12.46, 12.35, 22),
        Printed("the table's best baseline", 24.04),
    ),
    "snli": (
        Printed("DELLA", 5.13, 10.23, 5.86, 16.58, 23),
        Printed("the table's best baseline", 13.78),
    ),
}
